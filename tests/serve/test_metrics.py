"""Metrics as Prometheus' own parser reads them."""

import threading

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from handspun.serve.metrics import Metrics


def samples(metrics: Metrics, *, engine_up: bool = True) -> list[Sample]:
    families = text_string_to_metric_families(metrics.text(engine_up=engine_up))
    return [sample for family in families for sample in family.samples]


def value(metrics: Metrics, name: str, **labels: str) -> float:
    [found] = [one.value for one in samples(metrics) if (one.name, one.labels) == (f"handspun_{name}", labels)]
    return found


def test_text_names_every_metric_of_a_fresh_server() -> None:
    text = Metrics(["tuned"]).text(engine_up=False)
    found = {family.name: family.type for family in text_string_to_metric_families(text)}
    assert found == {
        **dict.fromkeys(("handspun_requests", "handspun_started", "handspun_rejected"), "counter"),
        **dict.fromkeys(("handspun_cancelled", "handspun_prompt_tokens", "handspun_cached_tokens"), "counter"),
        **dict.fromkeys(("handspun_generated_tokens", "handspun_drafted", "handspun_accepted"), "counter"),
        **dict.fromkeys(("handspun_running", "handspun_waiting", "handspun_engine_up"), "gauge"),
        **dict.fromkeys(("handspun_kv_tokens_used", "handspun_kv_tokens_capacity"), "gauge"),
        "handspun_cache_bytes": "gauge",
        **dict.fromkeys(("handspun_request_seconds", "handspun_step_seconds"), "histogram"),
        **dict.fromkeys(("handspun_time_to_first_token_seconds", "handspun_queue_seconds"), "histogram"),
        **dict.fromkeys(("handspun_inter_token_seconds", "handspun_grammar_compile_seconds"), "histogram"),
    }
    assert "handspun_engine_up 0\n" in text


def test_counters_begin_at_zero_and_add_up() -> None:
    metrics = Metrics(["tuned"])
    assert value(metrics, "rejected_total", reason="queue_full") == 0
    assert value(metrics, "started_total", model="tuned") == 0
    metrics.rejected("queue_full")
    metrics.cancelled("prefill")
    metrics.request_started("tuned")
    metrics.tokens(prompt=100, cached=64, generated=7, drafted=5, accepted=2)
    metrics.tokens(generated=3)
    assert value(metrics, "rejected_total", reason="queue_full") == 1
    assert value(metrics, "cancelled_total", phase="prefill") == 1
    assert value(metrics, "cancelled_total", phase="decode") == 0
    assert value(metrics, "started_total", model="tuned") == 1
    assert value(metrics, "prompt_tokens_total") == 100
    assert value(metrics, "cached_tokens_total") == 64
    assert value(metrics, "generated_tokens_total") == 10
    assert value(metrics, "drafted_total") == 5
    assert value(metrics, "accepted_total") == 2


def test_gauges_keep_the_last_value() -> None:
    metrics = Metrics()
    metrics.gauges(running=3, waiting=2, kv_used=100, kv_capacity=4096, cache_bytes=5_000_000)
    metrics.gauges(running=1, waiting=0, kv_used=50, kv_capacity=4096, cache_bytes=6_000_000)
    assert value(metrics, "running") == 1
    assert value(metrics, "waiting") == 0
    assert value(metrics, "kv_tokens_used") == 50
    assert value(metrics, "kv_tokens_capacity") == 4096
    assert value(metrics, "cache_bytes") == 6_000_000


def test_a_histogram_counts_a_value_on_a_bound_as_below_it() -> None:
    metrics = Metrics()
    for seconds in (0.02, 0.0201, 11.0):
        metrics.step("decode", seconds)
    assert value(metrics, "step_seconds_bucket", kind="decode", le="0.01") == 0
    assert value(metrics, "step_seconds_bucket", kind="decode", le="0.02") == 1
    assert value(metrics, "step_seconds_bucket", kind="decode", le="0.03") == 2
    assert value(metrics, "step_seconds_bucket", kind="decode", le="10") == 2
    assert value(metrics, "step_seconds_bucket", kind="decode", le="+Inf") == 3
    assert value(metrics, "step_seconds_count", kind="decode") == 3
    assert abs(value(metrics, "step_seconds_sum", kind="decode") - 11.0401) < 1e-9


def test_each_kind_of_time_has_its_histogram() -> None:
    metrics = Metrics()
    metrics.first_token("tuned", 0.3)
    metrics.queued(0.2)
    metrics.token_gap(0.01)
    metrics.grammar_compiled(1.5)
    metrics.request("/v1/models", 200, "", 0.001)
    assert value(metrics, "time_to_first_token_seconds_sum", model="tuned") == 0.3
    assert value(metrics, "queue_seconds_sum") == 0.2
    assert value(metrics, "inter_token_seconds_count") == 1
    assert value(metrics, "grammar_compile_seconds_sum") == 1.5
    assert value(metrics, "requests_total", endpoint="/v1/models", status="200", model="") == 1
    assert value(metrics, "request_seconds_count", endpoint="/v1/models") == 1


def test_labels_are_escaped() -> None:
    metrics = Metrics()
    metrics.request_started('a"b\\c\nd')
    [found] = [one for one in samples(metrics) if one.name == "handspun_started_total"]
    assert found.labels == {"model": 'a"b\\c\nd'}


def test_two_threads_lose_no_count() -> None:
    metrics = Metrics()

    def count() -> None:
        for _ in range(2000):
            metrics.tokens(generated=1)
            metrics.step("decode", 0.01)

    threads = [threading.Thread(target=count) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert value(metrics, "generated_tokens_total") == 4000
    assert value(metrics, "step_seconds_count", kind="decode") == 4000
