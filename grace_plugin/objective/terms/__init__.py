"""The loss terms: one file each, registered by name."""

from grace_plugin.objective.terms.base import (
    TERMS,
    Chart,
    LossTerm,
    RunContext,
    build_terms,
    check_names,
    check_terms,
    register_term,
)
from grace_plugin.objective.terms.head import HeadTerm
from grace_plugin.objective.terms.visual_relation import VisualRelationTerm

__all__ = [
    "TERMS",
    "Chart",
    "HeadTerm",
    "LossTerm",
    "RunContext",
    "VisualRelationTerm",
    "build_terms",
    "check_names",
    "check_terms",
    "register_term",
]

register_term(HeadTerm)
register_term(VisualRelationTerm)
