"""The compiler's own count of a program's multiply-adds."""

import jax
from jax import lax

from runs import QUICK

_CALLS = ("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call")
_PRODUCTS = ("dot_general", "conv_general_dilated")


def compiled_multiply_adds(function, *shapes, padded=True):
    """Multiply-adds of the convolutions and products in a function, as the compiler counts them.

    The compiler reports one number for all operations of the optimized program, two per multiply-add. So the
    program is compiled twice: whole, and without its products, whose results come in as arguments and whose
    operands go out as results. The difference is what the products take.

    Of a convolution that pads its input the compiler counts the taps that meet the image alone. With
    ``padded`` the zeros are put around the image before, and it counts all taps.
    """
    program = jax.make_jaxpr(function)(*shapes)
    arguments = jax.tree.leaves(shapes)
    results = []

    def whole(*arguments):
        return _evaluate(program.jaxpr, program.consts, arguments, lambda *it: _product(*it, padded))

    def note(equation, *operands):
        results.append(equation.outvars[0].aval)
        return [_product(equation, *operands, padded)[0]]

    jax.eval_shape(lambda *arguments: _evaluate(program.jaxpr, program.consts, arguments, note), *arguments)

    def rest(results, *arguments):
        given, read = iter(results), []

        def instead(equation, *operands):
            read.append(_pad(equation, *operands) if padded else operands)
            return [next(given)]

        return _evaluate(program.jaxpr, program.consts, arguments, instead), read

    results = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in results]
    return (_operations(whole, *arguments) - _operations(rest, results, *arguments)) / 2


def _operations(function, *arguments):
    compiled = jax.jit(function, keep_unused=True).lower(*arguments).compile(compiler_options=QUICK)
    return compiled.cost_analysis()["flops"]


def _evaluate(jaxpr, consts, arguments, product):
    """Runs a program with another function for its products."""
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))
    for equation in jaxpr.eqns:
        operands = [atom.val if hasattr(atom, "val") else values[atom] for atom in equation.invars]
        name = equation.primitive.name
        if name in _PRODUCTS:
            results = product(equation, *operands)
        elif name in _CALLS:
            inner = equation.params["jaxpr" if "jaxpr" in equation.params else "call_jaxpr"]
            results = _evaluate(inner.jaxpr, inner.consts, operands, product)
        else:
            results = equation.primitive.bind(*operands, **equation.params)
            results = results if equation.primitive.multiple_results else [results]
        values.update(zip(equation.outvars, results, strict=True))
    return [atom.val if hasattr(atom, "val") else values[atom] for atom in jaxpr.outvars]


def _product(equation, *operands_and_padded):
    *operands, padded = operands_and_padded
    params = dict(equation.params)
    if padded and equation.primitive.name == "conv_general_dilated":
        operands = _pad(equation, *operands)
        params["padding"] = ((0, 0),) * len(params["padding"])
    return [equation.primitive.bind(*operands, **params)]


def _pad(equation, x, kernel):
    """The operands with the zeros around the image, which the compiler may not undo."""
    if equation.primitive.name != "conv_general_dilated":
        return x, kernel
    margins = [(0, 0, 0)] * x.ndim
    axes = equation.params["dimension_numbers"].lhs_spec[2:]
    for axis, (low, high) in zip(axes, equation.params["padding"], strict=True):
        margins[axis] = (low, high, 0)
    return lax.optimization_barrier(lax.pad(x, x.dtype.type(0), margins)), kernel
