"""The run through a plan: what is measured, in which order, with which model, and when it stops."""

import pytest

from mobiquant_jax.benchmark import PARTS, BenchmarkSettings, Clock, Group, OutOfTime, measure, missing_rows, plan
from mobiquant_jax.benchmark import run as run_module
from mobiquant_jax.benchmark.run import Models
from mobiquant_jax.benchmark.table import Table
from mobiquant_jax.models.elastic import ElasticConfig


def table():
    return Table(path=None, identity={}, sessions=[{}])


class FakeModels:
    def get(self, weights):
        return weights

    def peaks(self):
        return {"memory": 1}


class FakeTime:
    now = 0.0


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr("time.monotonic", lambda: FakeTime.now)
    FakeTime.now = 0.0
    return Clock


def group(section, keys, weights, seconds):
    def rows(model, missing):
        for key in missing:
            FakeTime.now += seconds
            yield key | {"model": model}

    return Group(part="kernels", section=section, keys=keys, weights=weights, rows=rows)


def test_only_what_is_missing_is_measured_and_shown(clock):
    figures, shown = table(), []
    figures.add("kernels", {"depth": 2}, alone=False)
    keys = ({"depth": 1}, {"depth": 2}, {"depth": 3})
    groups = [group("kernels", keys, "packed", 1), group("switch", ({},), None, 1)]
    assert missing_rows(groups, figures) == ["kernels depth=1", "kernels depth=3", "switch"]
    measure(groups, figures, FakeModels(), clock(None), lambda *row: shown.append(row))
    assert shown == [
        ("kernels", {"depth": 1, "model": "packed"}),
        ("kernels", {"depth": 3, "model": "packed"}),
        ("switch", {"model": None}),
    ]
    assert figures.sections["switch"] == {"model": None, "session": 0}
    assert figures.sessions == [{"memory": 1}] and missing_rows(groups, figures) == []
    measure(groups, figures, FakeModels(), clock(None), lambda *row: pytest.fail("there is nothing to measure"))


def test_it_stops_before_a_row_that_might_be_late(clock):
    figures = table()
    slow = group("slow", tuple({"n": n} for n in range(2)), None, 10)
    quick = group("quick", tuple({"n": n} for n in range(9)), None, 1)  # 23 s and another 10 are too many
    with pytest.raises(OutOfTime, match="stopped after 23 of 33 s"):
        measure([slow, quick], figures, FakeModels(), clock(33), lambda *_: None)
    assert len(figures.sections["quick"]) == 3 and len(missing_rows([slow, quick], figures)) == 6


def test_finishing_in_time_is_no_stop(clock):
    measure([group("quick", ({"n": 0},), None, 1)], table(), FakeModels(), clock(1.5), lambda *_: None)


def test_one_model_at_a_time(monkeypatch, small_config):
    made = []
    for name in ("random_packed", "random_dense"):
        monkeypatch.setattr(run_module, name, lambda *_, name=name: made.append(name) or name)
    monkeypatch.setattr(run_module, "peak_memory", lambda: 2.5)
    models = Models(config=small_config(), elastic=ElasticConfig())
    assert [models.get(weights) for weights in ("packed", "packed")] == ["random_packed"] * 2
    assert models.peaks() == {"memory_packed_GB": 2.5}
    assert models.get(None) is None and models.get("dense") == "random_dense"
    assert made == ["random_packed", "random_dense"] and models.peaks() == {"memory_peak_GB": 2.5}


def test_the_plan_covers_what_was_asked(small_config):
    settings = BenchmarkSettings(batches=(1, 2), bits=(2.0, 8.0), prefill=(8,))
    config, elastic = small_config(), ElasticConfig()
    groups = plan(config, elastic, settings, PARTS)
    rows = {(g.section, *key.values()) for g in groups for key in g.keys}
    assert {("decode", b, bits) for b in (1, 2) for bits in (2.0, 8.0, 16.0)} <= rows
    assert {("kernels", product, depth) for product in ("qkv", "qkv+o+gate_up+down") for depth in (1, 2, 3, 4)} <= rows
    assert {("weights",), ("prefill", 8), ("switch",), ("router_share",)} <= rows
    only = plan(config, elastic, settings, ["switch", "routers"])
    assert [g.section for g in only] == ["router_share", "switch"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(steps=0), "steps must be at least 1, got 0"),
        (dict(batches=(1, 0)), r"batches must be numbers from 1, got \(1, 0\)"),
        (dict(bits=(9.0,)), "between 2 and 8, got 9"),
    ],
)
def test_settings_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        BenchmarkSettings(**fields)


def test_timed_tokens_must_fit_the_model(small_config):
    with pytest.raises(ValueError, match="context 120 and 16 steps exceed the model's 128 positions"):
        BenchmarkSettings(context=120, steps=16).check_model(small_config())
