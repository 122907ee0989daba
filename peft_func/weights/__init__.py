"""Structured weights: matrix expressions, operators, the carrier and its rules."""

from peft_func.weights import rules

__all__ = ["rules"]
