"""Reports of a round as text."""

import jax

import selconv_jax
from selconv_jax import AllocationRule
from selconv_jax.models import DenseNet
from states import perturbed_variables


def test_reports_print_in_a_line_and_in_a_table():
    variables = perturbed_variables(DenseNet(5, (1, 1), growth=4), (1, 8, 8, 3), seed=0)
    _, report = selconv_jax.reallocate(variables, jax.random.key(0), AllocationRule(threshold=0.3))
    assert repr(report) == (
        f"Report(deallocated={report.deallocated}, reallocated={report.reallocated}, open={report.open}, "
        f"copies={report.copies}, channels={report.channels}, layers={len(report.layers)})"
    )
    lines = report.summary().splitlines()
    assert len(lines) == len(report.layers) + 2
    assert len(set(map(len, lines))) == 1
    name, layer = next(iter(report.layers.items()))
    assert lines[1].split() == [
        name,
        *(
            str(int(value.sum()))
            for value in (layer.deallocated, layer.reallocated, layer.open, layer.copies)
        ),
        str(layer.deallocated.size),
    ]
    assert [*map(int, lines[-1].split()[1:3])] == [report.deallocated, report.reallocated]
    shown = []
    jax.make_jaxpr(lambda report: shown.append((repr(report), report.summary())))(report)
    assert shown[0][0].startswith("Report(deallocated=?, ")
    shapes = jax.tree.map(lambda leaf: None, report)
    assert "deallocated=?" in repr(shapes)
