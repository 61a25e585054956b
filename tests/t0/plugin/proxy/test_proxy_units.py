"""Pure functions of the proxy: paths, heads, measured starts, errors, settings, logs."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import re
import string
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plugin.proxy.admin import costs
from plugin.proxy.admin.stats import Histogram, Stats, merged
from plugin.proxy.errors import ClientFault, StartFailed, Unavailable, UpstreamFault, render
from plugin.proxy.http import wire
from plugin.proxy.http.address import from_spec, from_url, tcp, unix
from plugin.proxy.http.path_rules import PathRules, Verdict, absolute_form, canonical, readings
from plugin.proxy.http.request import Request
from plugin.proxy.logs import JsonFormatter, TextFormatter
from plugin.proxy.pool.pool import ReplicaPool
from plugin.proxy.pool.start_times import History, Kind, kind_of
from plugin.proxy.process_tree import process_tree
from plugin.proxy.settings import Settings
from plugin.runtime.phases import Phase, PhaseTracker, Span
from tests.kits.proxy.attacks import MATCHED_BY_PREFIX, spellings

pytestmark = pytest.mark.t0


@given(st.text(alphabet=string.ascii_letters + "/.%2fF5cC;?#\\ \t", max_size=40))
def test_canonical_paths_are_stable_without_dots_or_double_slashes(text):
    seen = canonical(b"/" + text.encode())
    assert canonical(seen.encode()) == seen
    assert seen.startswith("/") and "//" not in seen and "/./" not in seen and "/../" not in seen


@pytest.mark.slow
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # time limits are unreliable on a busy machine
@given(st.data())
def test_every_percent_spelling_of_a_denied_path_is_denied(data):
    path = "/release_memory_occupation"
    spelled = "".join(
        c
        if c == "/" or not data.draw(st.booleans())
        else data.draw(st.sampled_from([f"%{ord(c):02x}", f"%25{ord(c):02X}"]))
        for c in path
    )
    rules = PathRules("/-", frozenset({path}))
    assert rules.classify(spelled.encode() + b"?x=1") is Verdict.DENIED
    assert rules.classify(b"/v1/completions") is Verdict.PASS


@pytest.mark.parametrize("path", ["/sleep", "/metrics", "/v1/load_lora_adapter"])
def test_no_spelling_of_a_denied_path_passes(path):
    rules = PathRules("/-", frozenset({path}), "/api")
    for target in spellings(path, "/api"):
        plain = absolute_form(target.encode())
        assert rules.classify(plain[1] if plain else target.encode()) is Verdict.DENIED, target


def test_paths_that_engines_match_by_prefix_are_denied_by_prefix():
    rules = PathRules("/-", frozenset({"/metrics", "/sleep"}))
    assert {rules.classify(target.encode()) for target in MATCHED_BY_PREFIX} == {Verdict.DENIED}
    assert rules.classify(b"/sleepy") is Verdict.PASS


@given(st.text(alphabet=string.ascii_letters + "/.-_~:%2f;", max_size=30))
def test_the_resolved_path_is_among_the_readings(text):
    assert canonical(b"/" + text.encode()) in readings(b"/" + text.encode())


@pytest.mark.parametrize("path", ["", "/", "//", "/.", "/x/..", "%2f", "?x", "/;a", "#"])
def test_a_denied_path_that_names_nothing_or_everything_is_refused(path):
    with pytest.raises(ValueError, match="cannot deny"):
        Settings(denied_paths=frozenset({path}))


def test_a_long_path_passes_only_if_it_is_plain():
    rules = PathRules("/-", frozenset({"/sleep"}), "/a")
    assert rules.classify(b"/v1/" + b"x" * 20_000) is Verdict.PASS
    for text in (b"/a;b" * 5_000, b"/.." * 7_000, b"/a%" * 7_000, b"/" + b"%25" * 7_000):
        assert rules.classify(text) is Verdict.DENIED


def test_admin_paths_are_recognised_only_in_plain_spelling():
    rules = PathRules("/-", frozenset())
    assert rules.classify(b"/-/status") is rules.classify(b"/-") is Verdict.ADMIN
    for spelling in (b"/%2d/status", b"//-/status", b"/x/../-/status", b"/-/%73tatus"):
        assert rules.classify(spelling) is Verdict.DENIED
    assert rules.classify(b"/--/status") is Verdict.PASS


def test_cached_verdicts_are_evicted():
    rules = PathRules("/-", frozenset({"/sleep"}))
    for n in range(10_000):
        assert rules.classify(b"/%d" % n) is Verdict.PASS
    assert len(rules._cache) <= 4096


def test_verdicts_of_long_paths_are_not_cached():
    rules = PathRules("/-", frozenset({"/sleep"}))
    tracemalloc.start()
    for number in range(100):
        assert rules.classify(b"/%060000d" % number) is Verdict.PASS
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 1 << 20


def test_an_absolute_form_target_is_split_into_host_and_path():
    assert absolute_form(b"http://h:1/a?b") == (b"h:1", b"/a?b")
    assert absolute_form(b"http://h?b") == (b"h", b"/?b")
    assert absolute_form(b"/a") is None


def test_the_kind_of_a_start_follows_from_its_phases():
    assert kind_of([Phase.MOUNTING]) is None
    assert kind_of([Phase.MOUNTING, Phase.RESTORING, Phase.WAKING]) is Kind.RESTORED
    assert kind_of([Phase.MOUNTING, Phase.RESTORING, Phase.FAILED, Phase.MOUNTING, Phase.STARTING]) is Kind.COLD
    assert kind_of([Phase.WAKING]) is Kind.WOKEN


def test_deadlines_and_remaining_times_follow_measured_starts():
    history = History()
    assert history.deadline(Kind.RESTORED) == 30.0 and history.typical(Kind.COLD) == 120.0
    for seconds in (0.5, 0.6, 20.0):
        history.record(Kind.RESTORED, seconds, (Span(Phase.RESTORING, 0.0, seconds),))
    assert history.typical(Kind.RESTORED) == 0.6
    assert history.deadline(Kind.RESTORED) == 80.0
    assert history.left(Kind.RESTORED, 0.1) == 0.5
    assert history.left(Kind.RESTORED, 5.0) == 15.0
    assert history.left(Kind.RESTORED, 40.0) == 20.0
    assert history.last[Kind.RESTORED][0].took_s == 20.0
    for _ in range(1000):
        history.record(Kind.COLD, 1.0)
    assert len(history.seen(Kind.COLD)) == 64


def test_one_slow_start_changes_no_estimate():
    history = History(restored=(0.4, 13.4))
    assert history.typical(Kind.RESTORED) == 0.4, "the lower median"
    history = History(restored=(0.4, 0.5, 0.4), cold=(90.0,))
    history.record(Kind.RESTORED, 13.4, (Span(Phase.MOUNTING, 0.0, 0.4), Span(Phase.RESTORING, 0.4, 13.0)))
    assert history.left(Kind.RESTORED, 0.3, Phase.MOUNTING, 0.3) == pytest.approx(0.1), "its phases, measured once"
    history.record(Kind.FIRST_RESTORE, 40.0)
    assert history.typical(Kind.RESTORED) == 0.4 and history.median(Kind.FIRST_RESTORE) == 40.0
    assert history.deadline(Kind.RESTORED) == 160.0, "a restore may turn out to be a first one"


def test_the_kind_of_the_next_start_is_predicted():
    from plugin.proxy.pool.pool import ReplicaPool
    from plugin.runtime.phases import PhaseTracker

    pool = ReplicaPool(history=History(cold=(13.4,)))
    tracker = PhaseTracker()
    replica = pool.add("r0", tracker)
    tracker.to(Phase.MOUNTING)
    assert pool.progress().kind is Kind.COLD
    pool.next_kind = lambda: Kind.RESTORED
    assert pool.progress().kind is Kind.RESTORED and pool.progress().expected_s < 13
    replica.record(Phase.IDLE, Phase.MOUNTING)
    replica.record(Phase.MOUNTING, Phase.RESTORING)
    replica.recording = lambda: True
    assert replica.start_kind is Kind.FIRST_RESTORE


@pytest.mark.parametrize("draining", [False, True])
def test_the_end_of_a_long_cold_start_expires_no_request_that_waited_for_it(draining):
    """The next start would be a restore, with a deadline that the request has passed long ago."""

    async def main():
        loop, pool, tracker = asyncio.get_running_loop(), ReplicaPool(), PhaseTracker()
        pool.bind(loop)
        pool.next_kind = lambda: Kind.RESTORED
        replica = pool.add("r0", tracker, tcp("127.0.0.1", 1))
        for phase in (Phase.MOUNTING, Phase.STARTING, Phase.LOADING):
            tracker.to(phase)
        await asyncio.sleep(0.01)
        waiting = asyncio.create_task(pool.acquire(since=time.monotonic() - 60))
        await asyncio.sleep(0.01)
        pool._tick(loop)
        assert pool.history.deadline(pool.progress().kind) > 60
        replica.draining = draining
        for phase in (Phase.WARMING, Phase.SERVING):
            tracker.to(phase)
        assert pool.history.deadline(pool.progress().kind) < 60
        pool._tick(loop)  # before the loop has heard of the transition
        assert pool.held == int(draining)
        replica.draining = False
        pool.dispatch()
        assert await waiting is replica

    asyncio.run(main())


def test_the_remaining_time_follows_the_phase():
    history = History()
    phases = ((Phase.MOUNTING, 1.0), (Phase.STARTING, 10.0), (Phase.LOADING, 4.0), (Phase.WARMING, 20.0))
    for factor in (1.0, 1.0, 2.0):
        spans, at = [], 0.0
        for phase, took in phases:
            spans.append(Span(phase, at, took * factor))
            at += took * factor
        history.record(Kind.COLD, at, tuple(spans))
    # mounting took far longer than ever; the phases after it do not take longer
    assert history.left(Kind.COLD, 100.0, Phase.STARTING, 0.0) == 34.0
    assert history.left(Kind.COLD, 100.0, Phase.WARMING, 5.0) == 15.0
    assert history.left(Kind.COLD, 100.0, Phase.WARMING, 25.0) == 15.0, "until the slowest measured start"
    assert history.left(Kind.COLD, 100.0, Phase.WARMING, 50.0) == 25.0, "then half its age"
    assert history.left(Kind.COLD, 5.0, Phase.RESTORING, 1.0) == 30.0, "a phase that was never measured"
    # the timeline begins with a failed restore, whose mounting does not count
    failed = (Span(Phase.MOUNTING, 0, 3.0), Span(Phase.RESTORING, 3, 2.0), Span(Phase.MOUNTING, 5, 1.0))
    history.record(Kind.COLD, 8.0, (*failed, Span(Phase.STARTING, 6, 2.0)))
    assert history.left(Kind.COLD, 6.0, Phase.MOUNTING, 0.5) == 0.5 + 10.0


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (b"wait=10", 10.0),
        (b"respond-async, wait=3.5; x=y", 3.5),
        (b"Wait = 2", 2.0),
        (b"respond-async", math.inf),
        (b"wait=soon", math.inf),
        (b"wait=-1", math.inf),
        (b"wait=nan", math.inf),
        (b"", math.inf),
    ],
)
def test_the_prefer_header_is_a_preference(value, seconds):
    request = Request()
    request.target = b"/"
    request.headers = [(b"host", b"Host", b"t"), (b"prefer", b"Prefer", value)]
    request.validate(b"GET", "1.1", True)
    assert request.hold_s == seconds


@given(st.lists(st.floats(0.001, 1000), min_size=1, max_size=64), st.floats(0, 5000))
def test_the_remaining_time_is_never_zero(durations, elapsed):
    history = History(cold=durations)
    assert 0 < history.left(Kind.COLD, elapsed) <= max(*durations, 1.0, elapsed)


def test_errors_have_the_shape_of_their_api():
    status, headers, body = render(Unavailable("hold-deadline", "m", retry_after_s=1.2), "/v1/completions", "id")
    assert status == 503 and (b"retry-after", b"2") in headers
    assert json.loads(body)["error"] == {"message": "m", "type": "server_error", "param": None, "code": "hold-deadline"}
    status, _, body = render(ClientFault("x", "m", status=413), "/v1/messages", "id")
    document = json.loads(body)
    assert status == 413 and document["type"] == "error" and document["error"]["type"] == "request_too_large"
    assert render(UpstreamFault("u", "m", status=504), "/", "id")[0] == 504


def test_a_fresh_error_keeps_its_type_and_drops_the_traceback():
    try:
        raise StartFailed("no-gpu", "no GPU", retry_after_s=3)
    except StartFailed as error:
        twin = error.fresh()
    assert type(twin) is StartFailed and (twin.code, twin.message, twin.retry_after_s) == ("no-gpu", "no GPU", 3)
    assert twin.__traceback__ is None and str(twin) == "no GPU"


def test_framing_and_routing_trailers_are_dropped():
    fields = [(b"x-a", b"X-A", b"1"), (b"content-length", b"Content-Length", b"5"), (b"host", b"Host", b"h")]
    assert wire.last_chunk(fields) == b"0\r\nX-A: 1\r\n\r\n"
    assert wire.last_chunk(fields[1:]) == b"0\r\n\r\n"


def test_request_ids():
    assert wire.usable_request_id(b"req_1-x") and not wire.usable_request_id(b"") and not wire.usable_request_id(b"a b")
    assert not wire.usable_request_id("é".encode()) and not wire.usable_request_id(b"a" * 129)
    assert len(wire.new_request_id()) == 24


@pytest.mark.parametrize(
    "bad", [{"max_held": -1}, {"admin_prefix": "x"}, {"admin_prefix": "/"}, {"admin_prefix": "/-/"}, {"drain_s": -0.1}]
)
def test_invalid_settings_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Settings(**bad)


def test_upstreams_from_urls_and_specs():
    assert from_url("http://127.0.0.1:81").name == "127.0.0.1:81"
    assert from_url("127.0.0.1:81").authority == b"127.0.0.1:81"
    assert from_url("unix:/run/x.sock").name == "unix:/run/x.sock"
    assert from_url("https://example.test").tls is not None
    for bad in ("ftp://x", "http://x/path", "unix:relative", "http://u:p@x", "http://"):
        with pytest.raises(ValueError):
            from_url(bad)
    for upstream in (tcp("127.0.0.1", 1), unix("/x"), from_url("https://example.test")):
        assert upstream.spec is not None
        twin = from_spec(upstream.spec)
        assert (twin.name, twin.tls, twin.server_hostname) == (upstream.name, upstream.tls, upstream.server_hostname)
    with pytest.raises(ValueError, match="kind"):
        from_spec({"kind": "pigeon"})


def test_histograms():
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        histogram.add(value)
    assert histogram.counts == [2, 1, 1] and histogram.total == 12.0
    assert histogram.document() == {"bounds": [1.0, 2.0], "counts": [2, 1, 1], "sum": 12.0}


def test_the_workers_counts_are_summed():
    one, two = Stats(), Stats()
    one.outcomes["forwarded"] += 2
    two.outcomes["forwarded"] += 3
    two.upstream_errors["upstream-cut"] += 1
    one.held.add(0.2)
    two.held.add(400.0)
    one.requests, two.requests = 2, 4
    one.finished["llama"] += 2
    two.finished.update(llama=1, qwen=1)
    both = merged([one.document(), two.document()])
    assert both["outcomes"] == {"forwarded": 5} and both["upstream_errors"] == {"upstream-cut": 1}
    assert both["finished"] == {"llama": 3, "qwen": 1}
    assert both["requests"] == 6 and sum(both["held_seconds"]["counts"]) == 2 and both["held_seconds"]["sum"] == 400.2


def test_the_metrics_match_the_documentation():
    from plugin.proxy.admin.endpoints import status_document
    from plugin.proxy.admin.metrics import exposition
    from plugin.proxy.pool.pool import ReplicaPool
    from plugin.proxy.server import ProxyServer

    text = exposition(asyncio.run(status_document(ProxyServer(ReplicaPool())))).decode()
    page = (Path(__file__).parents[4] / "docs" / "proxy.md").read_text("utf-8")
    for prefix, kind in (("quickthaw_proxy_", "quickthaw_proxy_"), ("quickthaw_", "quickthaw_(?!proxy_)")):
        exported = set(re.findall(rf"^# TYPE {kind}(\w+)", text, re.MULTILINE))
        table = page.partition(f"| metric (`{prefix}…`)")[2].partition("\n\n")[0]
        rows = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
        assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == exported


def test_a_restore_that_ended_before_the_proxy_listened_is_recorded():
    from plugin.proxy.admin.endpoints import pool_document
    from plugin.proxy.pool.pool import ReplicaPool
    from plugin.runtime.phases import Phase, PhaseTracker

    clock = iter(range(100))
    tracker = PhaseTracker(clock=lambda: float(next(clock)))
    for phase in (Phase.MOUNTING, Phase.RESTORING, Phase.WAKING, Phase.VERIFYING, Phase.SERVING):
        tracker.to(phase)
    pool = ReplicaPool()
    pool.add("r0", tracker)
    shown = pool_document(pool)
    assert [span["phase"] for span in shown["starts"]["restored"]] == ["mounting", "restoring", "waking", "verifying"]
    assert pool.history.seen(Kind.RESTORED) == (pytest.approx(4.0, abs=0.5),)
    assert shown["progress"]["left_s"] == 0.0


def test_a_log_line_is_one_json_object():
    record = logging.LogRecord("quickthaw.proxy", logging.INFO, __file__, 1, "request", (), None)
    record.event = "request"
    record.fields = {"request_id": "a\nb", "held_s": 0.5}
    line = JsonFormatter().format(record)
    assert "\n" not in line and json.loads(line)["request_id"] == "a\nb" and json.loads(line)["event"] == "request"


def test_a_text_log_line_has_the_reason_and_the_object():
    record = logging.LogRecord("quickthaw.proxy", logging.INFO, __file__, 1, "r0: asleep → waking", (), None)
    record.event, record.fields = "phase", {"reason": "woken"}
    assert TextFormatter().format(record).endswith("info    r0: asleep → waking (woken)")
    record.event, record.fields = "request", {"request_id": "abc", "reason": "x"}
    assert TextFormatter().format(record).endswith("waking [abc]")


def test_memory_is_measured_for_serving_replicas_with_a_known_process():
    pool = ReplicaPool()
    replica = pool.add("a", PhaseTracker(phase=Phase.SERVING))
    replica.engine_pid = os.getpid
    asyncio.run(costs.measure([pool]))
    assert replica.memory_bytes > 1 << 20
    replica.engine_pid = lambda: None
    asyncio.run(costs.measure([pool]))
    assert replica.memory_bytes is None and replica.gpu_bytes is None


def test_a_process_tree_includes_descendants():
    nested = (
        "import subprocess, sys; subprocess.run([sys.executable, '-c', 'print(1, flush=True); input()'], check=False)"
    )
    with subprocess.Popen([sys.executable, "-c", nested], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        found = process_tree(os.getpid())
        assert found[0] == os.getpid() and child.pid in found and len(process_tree(child.pid)) == 2
        child.communicate(b"\n")
    assert process_tree(child.pid) == [child.pid], "an ended process has no descendants"
