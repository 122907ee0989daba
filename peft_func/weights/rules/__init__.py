"""What each torch function does with a structured weight; importing this package registers all rules."""

from peft_func.weights.rules import attention, conv, embedding, grouped, matmul, questions, views

__all__ = ["attention", "conv", "embedding", "grouped", "matmul", "questions", "views"]
