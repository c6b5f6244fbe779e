"""A controlled study of what GRACE is worth against everything else on the same work: `python -m benchmarks.accuracy --help`.

Teacher and student are LLaVA models trained here, from scratch, on scenes composed of CIFAR-10 photographs. The teacher has
learned from many photographs; the student, and every method, has a small set of others. One row is one model, one JSON file.
`--set captions` is the same on a second data set, images with free-form captions.
"""
