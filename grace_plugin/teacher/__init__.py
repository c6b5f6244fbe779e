"""Where the teacher's hidden states come from."""

from grace_plugin.teacher.resident import MISSING, ResidentTeacher, TeacherStates, load_teacher

__all__ = ["MISSING", "ResidentTeacher", "TeacherStates", "load_teacher"]
