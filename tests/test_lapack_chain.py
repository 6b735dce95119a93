"""No program of ours has two LAPACK calls that could run at the same time.

A batched LAPACK call of jaxlib's CPU backend cuts its batch into tasks for the thread pool that it
itself runs on, and waits for them. Two such calls at a time on a pool of two threads wait for ever
(jaxlib 0.10.2), and only sometimes: so the property is tested, not the hang.
"""

import jax
import jax.numpy as jnp
import pytest
import small_run
from jax.extend.core import Literal

from qkjax import evaluation, model, sharding
from qkjax.measures import probes

_LAPACK = {"geqrf", "qr", "householder_product", "svd", "eigh", "lu", "cholesky"}


def independent_calls(jaxpr, found=None) -> list[tuple[str, str]]:
    """Pairs of LAPACK calls of one (sub)program of which neither needs the other's result."""
    found = [] if found is None else found
    reach: dict = {}  # variable -> LAPACK calls that it depends on
    calls: list[int] = []
    for number, equation in enumerate(jaxpr.eqns):
        inner = inner_programs(equation)
        needs = set().union(
            *(reach.get(v, set()) for v in equation.invars if not isinstance(v, Literal))
        )
        if equation.primitive.name in _LAPACK or any(contains_lapack(sub) for sub in inner):
            name = equation.primitive.name
            found += [(jaxpr.eqns[c].primitive.name, name) for c in calls if c not in needs]
            calls.append(number)
            needs = needs | {number}
        for sub in inner:
            independent_calls(sub, found)
        for variable in equation.outvars:
            reach[variable] = needs
    return found


def inner_programs(equation) -> list:
    """The subprograms of a jit, scan, cond and the like."""
    return [
        value.jaxpr if hasattr(value, "jaxpr") else value
        for parameter in equation.params.values()
        for value in (parameter if isinstance(parameter, tuple | list) else (parameter,))
        if hasattr(value, "eqns") or hasattr(value, "jaxpr")
    ]


def contains_lapack(jaxpr) -> bool:
    """Whether a LAPACK call stands anywhere in it."""
    return any(
        equation.primitive.name in _LAPACK or any(map(contains_lapack, inner_programs(equation)))
        for equation in jaxpr.eqns
    )


def test_the_check_sees_independent_calls():
    def two(x):
        return jnp.linalg.qr(x, mode="r"), jnp.linalg.svd(x + 1, compute_uv=False)

    def chained(x):
        return jnp.linalg.svd(jnp.linalg.qr(x, mode="r"), compute_uv=False)

    x = jnp.ones((3, 5, 4))
    assert independent_calls(jax.make_jaxpr(two)(x).jaxpr)
    assert contains_lapack(jax.make_jaxpr(chained)(x).jaxpr)
    assert not independent_calls(jax.make_jaxpr(chained)(x).jaxpr)
    assert independent_calls(jax.make_jaxpr(jax.jit(two))(x).jaxpr)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])  # float64 moments, QR factors
def test_evaluation_has_none(platform, tmp_path):
    config = small_run.make_config(tmp_path, "muon", "learned").for_platform("cpu")
    step = evaluation.make_eval_step(config, sharding.make_mesh())
    rows, length = 5, config.model.sequence_length + 1
    params = model.parameter_shapes(config.model)
    statistics = jax.eval_shape(lambda: probes.empty_statistics(config, platform))
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    valid = jax.ShapeDtypeStruct((rows,), bool)
    program = jax.make_jaxpr(step)(params, statistics, tokens, valid).jaxpr
    assert contains_lapack(program) == (platform == "tpu")
    assert independent_calls(program) == []
    program = jax.make_jaxpr(evaluation.decompose)(statistics, params).jaxpr
    assert contains_lapack(program)
    assert independent_calls(program) == []
