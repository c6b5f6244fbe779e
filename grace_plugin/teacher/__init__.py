"""Teachers: a model on the device, a model in host memory, a cache of hidden states, or the student itself."""

from grace_plugin.teacher.base import MISSING, GivenTeacher, Teacher, TeacherStates, model_inputs, supervised_positions
from grace_plugin.teacher.build import CachePlan, build_cache
from grace_plugin.teacher.cached import CachedTeacher, check_cached_processor, check_cached_samples, open_store
from grace_plugin.teacher.offloaded import OffloadedTeacher
from grace_plugin.teacher.open import check_pair, open_teacher
from grace_plugin.teacher.resident import ResidentTeacher, load_teacher
from grace_plugin.teacher.self_teacher import SelfTeacher
from grace_plugin.teacher.store import StateStore

__all__ = [
    "MISSING",
    "CachePlan",
    "CachedTeacher",
    "GivenTeacher",
    "OffloadedTeacher",
    "ResidentTeacher",
    "SelfTeacher",
    "StateStore",
    "Teacher",
    "TeacherStates",
    "build_cache",
    "check_cached_processor",
    "check_cached_samples",
    "check_pair",
    "load_teacher",
    "model_inputs",
    "open_store",
    "open_teacher",
    "supervised_positions",
]
