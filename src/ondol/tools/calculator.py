"""The calculator: + - * / // % ** and parentheses; exact integers."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from decimal import Decimal
from typing import Any, ClassVar

from pydantic import Field

from ondol.records import ToolResult
from ondol.tools.base import Tool

_MAX_CHARS = 400
_MAX_BITS = 4096  # of an integer: about 1,200 digits, below the 4,300 that Python turns into text
_SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-"})

_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: lambda a, b: a // b if isinstance(a, int) and isinstance(b, int) and b and a % b == 0 else a / b,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_UNARY: dict[type, Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


class Calculator(Tool):
    """Evaluate one arithmetic expression."""

    name: ClassVar[str] = "calculator"
    main_argument: ClassVar[str] = "expression"
    parameters: ClassVar[dict[str, Any]] = {
        "type": "object",
        "properties": {"expression": {"type": "string", "description": "An expression such as (2 + 3) * 4."}},
        "required": ["expression"],
    }

    description: str = Field(
        default="Evaluates an arithmetic expression with + - * / // % ** and parentheses.",
        description="what the model reads about the tool",
    )
    timeout_s: float = Field(default=1.0, gt=0, le=600, description="time limit of one call")

    def session(self, trajectory_id: str) -> CalculatorSession:
        return CalculatorSession()


class CalculatorSession:
    """It remembers nothing."""

    async def call(self, arguments: dict[str, Any]) -> ToolResult:
        try:
            return ToolResult(plain(evaluate(arguments["expression"])))
        except (ValueError, ArithmeticError) as e:
            return ToolResult(f"Error: {e}", ok=False, kind="error")

    async def close(self) -> None:
        pass


def evaluate(expression: str) -> int | float:
    """The value of an arithmetic expression; an int wherever it is one exactly.

    Raises ValueError for what is not arithmetic or grows too large, ZeroDivisionError for a division by zero. Never
    takes long: the expression's length and every intermediate value are bounded.
    """
    if len(expression) > _MAX_CHARS:
        raise ValueError(f"the expression is longer than {_MAX_CHARS} characters")
    try:
        tree = ast.parse(expression.translate(_SIGNS).strip(), mode="eval")
        return _value(tree.body)
    except (RecursionError, MemoryError):
        raise ValueError("the expression is nested too deeply") from None
    except SyntaxError:
        raise ValueError(f"{expression!r} is not an arithmetic expression") from None


def plain(value: int | float) -> str:
    """A number as a person would write it: 2 for 2.0, 0.3 for 0.1 + 0.2, no exponent where digits do."""
    if isinstance(value, int):
        return str(value)
    if value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    text = f"{value:.15g}"
    if "e" in text and 1e-9 < abs(value) < 1e21:
        text = f"{Decimal(text):f}"
    return text


def _value(node: ast.expr) -> int | float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _bounded(node.value)
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        return _UNARY[type(node.op)](_value(node.operand))
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        a, b = _value(node.left), _value(node.right)
        # Before it is computed: the bits of a power are the bits of its base times the exponent.
        if (
            isinstance(node.op, ast.Pow)
            and isinstance(a, int)
            and abs(a) > 1
            and a.bit_length() * abs(b) > 2 * _MAX_BITS
        ):
            raise ValueError("a number grows too large")
        try:
            return _bounded(_BINARY[type(node.op)](a, b))
        except OverflowError:
            raise ValueError("a number grows too large") from None
    hint = " (use ** for powers)" if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitXor) else ""
    raise ValueError(f"only numbers, + - * / // % ** and parentheses are allowed{hint}")


def _bounded(value: Any) -> int | float:
    if isinstance(value, complex):
        raise ValueError("the result is not a real number")
    if value.bit_length() > _MAX_BITS if isinstance(value, int) else not math.isfinite(value):
        raise ValueError("a number grows too large")
    return value
