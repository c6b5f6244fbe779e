"""Speed, accuracy and simulations; every figure of the README comes from a file under results/."""
