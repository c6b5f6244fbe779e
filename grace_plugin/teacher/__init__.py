"""Where the teacher's hidden states come from."""

from grace_plugin.teacher.resident import ResidentTeacher, TeacherStates, load_teacher

__all__ = ["ResidentTeacher", "TeacherStates", "load_teacher"]
