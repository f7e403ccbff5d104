import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diablo_theory.theory import gradients
from diablo_theory.theory.arithmetic import gaussian, seeded
from diablo_theory.theory.network_instances import attention_problem, mlp_problem
from diablo_theory.theory.networks import flat
from diablo_theory.theory.stationarity import certificate, rank_premise

NETWORKS = {
    "tanh, ragged": partial(mlp_problem, (7, 10, 5), (3, 4), 9),
    "relu and head": partial(mlp_problem, (7, 8, 6), (2, 3), 9, activation="relu", head_width=2),
    "attention": partial(attention_problem, 7, 8, 3, 3, 3),
}


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_a_layer_s_gradients_are_the_products_of_its_inputs_and_output_gradients(make):
    problem = make(seeded(0))
    updates = problem.random_updates(seeded(1))
    layers = gradients.layer_gradients(problem, updates)
    assert len(layers) == len(problem.layouts)
    for layer, layout, dense in zip(layers, problem.layouts, gradients.dense_gradients(problem, updates), strict=True):
        assert layer.layout == layout
        full = layer.X.T @ layer.g
        assert full.norm() > 0
        torch.testing.assert_close(layer.dense, full, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(dense, layer.dense, rtol=0, atol=0)
        torch.testing.assert_close(flat(layer.blocks), flat(layout.gather(full)), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_a_transposed_layer_has_the_transposed_gradients(make):
    problem = make(seeded(0))
    for layer in gradients.layer_gradients(problem, problem.random_updates(seeded(1))):
        dual = layer.transposed
        torch.testing.assert_close(dual.X.T @ dual.g, layer.dense.T, rtol=1e-10, atol=1e-13)
        assert torch.equal(dual.dense, layer.dense.T)
        torch.testing.assert_close(flat(dual.blocks), flat(dual.layout.gather(layer.dense.T)), rtol=1e-10, atol=1e-13)
        assert torch.equal(dual.transposed.blocks[0], layer.blocks[0])
        assert dual.transposed.layout == layer.layout


@given(st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)), st.integers(1, 12), st.data())
def test_the_transposed_certificate_is_the_dual_bound_by_numpy(sizes, samples, data):
    blocks = [data.draw(st.integers(1, max(pair))) for pair in (sizes[:2], sizes[1:])]
    problem = mlp_problem(sizes, blocks, samples, seeded(data.draw(st.integers(0, 99))), head_width=2)
    layer = gradients.layer_gradients(problem, problem.random_updates(seeded(1)))[-1]
    dual = layer.transposed
    found, premise = certificate(dual.X, dual.g, dual.layout), rank_premise(dual.X, dual.layout)
    X, g, layout = layer.X.numpy(), layer.g.numpy(), layer.layout
    amplification, leak, ranks = 0.0, 0.0, []
    for i in range(layout.count):
        X_i, g_i = X[:, layout.rows(i)], g[:, layout.cols(i)]
        if X_i.shape[1] == 0:
            continue
        E_i = np.linalg.pinv(g_i, rcond=1e-11) @ g if g_i.size else np.zeros((0, g.shape[1]))
        amplification = max(amplification, np.linalg.norm(E_i, 2) if g_i.size else 0.0)
        leak += np.linalg.norm((g - g_i @ E_i).T @ X_i) ** 2
        ranks.append(int(np.linalg.matrix_rank(g_i, tol=1e-11 * np.linalg.norm(g, 2))) if g_i.size else 0)
    scale = float(np.linalg.norm(X) * np.linalg.norm(g))
    assert found.amplification == pytest.approx(amplification, rel=1e-6)
    assert found.leak == pytest.approx(leak**0.5, rel=1e-6, abs=1e-9 * scale)
    assert found.grad_full == pytest.approx(float(layer.dense.norm()), rel=1e-10, abs=1e-12 * scale)
    assert found.grad_blocks == pytest.approx(float(flat(layer.blocks).norm()), rel=1e-10, abs=1e-12 * scale)
    assert float(layer.dense.norm()) <= found.bound * (1 + 1e-9) + 1e-12 * scale
    assert premise.block_ranks == tuple(ranks)


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_lora_s_gradients_follow_from_the_dense_one_by_the_product_rule(make):
    problem, scale = make(seeded(0)), 1.5
    adapted = problem.weights[: len(problem.layouts)]
    generator = seeded(1)
    factors = [(gaussian(len(W), 2, generator), gaussian(2, W.shape[1], generator)) for W in adapted]
    moved = [W + scale * A @ B for W, (A, B) in zip(adapted, factors, strict=True)]
    there = dataclasses.replace(problem, weights=(*moved, *problem.weights[len(adapted) :]))
    dense = gradients.dense_gradients(there, there.zero_updates())
    found = gradients.lora_gradients(problem, factors, scale)
    for (grad_a, grad_b), (A, B), G in zip(found, factors, dense, strict=True):
        torch.testing.assert_close(grad_a, scale * G @ B.T, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(grad_b, scale * A.T @ G, rtol=1e-9, atol=1e-11)
