"""What lies outside the routed experts: its matrices, its cache and its memory."""

from dataclasses import replace

import numpy as np
import pytest
from benches import TINY

from dmpq.formats import Menu
from dmpq.hw_models import Workload, load_hardware
from dmpq.hw_models.resident import (
    cache_bytes,
    head_shape,
    resident_bytes,
    resident_matrices,
    score_flops,
    score_rows,
)
from dmpq.spec import GEOMETRIES, load_geometry

MENU = Menu()


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("workload", [Workload(), Workload("prefill", 2, 300)], ids=str)
def test_memory_is_that_of_the_analytical_model(geometry, workload):
    spec = load_geometry(geometry)
    maps = np.zeros((1, spec.num_experts), int)
    parts = load_hardware("a100").breakdown(spec, MENU, maps, workload)
    assert resident_bytes(spec, workload) == parts.resident_bytes


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_resident_matrices_hold_the_resident_weights(geometry):
    spec = load_geometry(geometry)
    held = sum(count * out * columns for (out, columns), count in resident_matrices(spec).items())
    head = np.prod(head_shape(spec))
    outside = spec.other_parameters - (1 if spec.tie_word_embeddings else 2) * head
    assert held == pytest.approx(outside, rel=1e-3)  # norms and biases are no matrices


def test_latent_attention_counts_as_one_matrix_of_as_many_weights():
    spec = replace(TINY, attention_parameters=6400, cache_values=40)
    assert resident_matrices(spec)[100, 64] == 3
    assert cache_bytes(spec, Workload(batch=2, context=10)) == 2 * 10 * 40 * 3 * 2


def test_queries_that_share_a_part_of_the_cache():
    assert score_rows(TINY, Workload(batch=8)) == 2
    assert score_rows(TINY, Workload("prefill", 8, 300)) == 300


def test_scores_read_the_whole_context_in_decode_and_half_in_prefill():
    decode = score_flops(TINY, Workload(batch=1, context=100))
    assert decode == 3 * 4 * 100 * 64
    assert score_flops(TINY, Workload("prefill", 1, 100)) == decode * 50
