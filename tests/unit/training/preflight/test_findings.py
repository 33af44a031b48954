"""Findings: merged over nodes, shown as a table, and turned into blame."""

from __future__ import annotations

from sdtrain.training.preflight.findings import Finding, failing_hosts, merge, table


def test_what_is_well_takes_one_row_and_what_is_not_one_per_thing_found() -> None:
    by_host = {
        "n1": [Finding("scratch", "ok", "9 GiB"), Finding("gpus", "ok", "8")],
        "n2": [Finding("scratch", "ok", "7 GiB"), Finding("gpus", "failed", "7 visible", "look")],
        "n3": [Finding("scratch", "failed", "gone"), Finding("gpus", "failed", "7 visible", "look")],
    }
    merged = merge(by_host)
    assert [(one.check, one.status, one.hosts) for one in merged] == [
        ("scratch", "ok", ("n1", "n2")),
        ("scratch", "failed", ("n3",)),
        ("gpus", "ok", ("n1",)),
        ("gpus", "failed", ("n2", "n3")),
    ]


def test_the_ranks_of_a_host_name_it_once() -> None:
    merged = merge({"n1": [Finding("computing", "ok", "1 ms"), Finding("computing", "ok", "2 ms")]})
    assert merged == [Finding("computing", "ok", "1 ms", hosts=("n1",))]


def test_a_node_is_to_blame_for_itself_and_for_what_others_can_do() -> None:
    broken = Finding("computing", "failed", "wrong", of_node=True, hosts=("n2",))
    assert failing_hosts([broken], ["n2"]) == {"n2": ["computing: wrong"]}, "alone as well"
    everywhere = Finding("manifest", "failed", "missing", hosts=("n1", "n2"))
    assert failing_hosts([everywhere], ["n1", "n2"]) == {}, "the page is wrong"
    here = Finding("manifest", "failed", "missing", hosts=("n2",))
    assert failing_hosts([here], ["n1", "n2"]) == {"n2": ["manifest: missing"]}
    in_two_ways = [here, Finding("manifest", "failed", "cut short", hosts=("n1",))]
    assert failing_hosts(in_two_ways, ["n1", "n2"]) == {}, "nobody can read it"
    assert failing_hosts([Finding("speed", "warning", "slow", of_node=True, hosts=("n1",))], ["n1"]) == {}


def test_the_table_says_what_to_do_and_where() -> None:
    findings = [
        Finding("gpus", "ok", "8 visible", hosts=("n1", "n2")),
        Finding("scratch", "failed", "TMPDIR is full", "remove something", hosts=("n2",)),
    ]
    assert table(findings, 2).splitlines() == [
        "check           status   found",
        "gpus            ok       all 2 nodes, as n1: 8 visible",
        "scratch         FAILED   n2: TMPDIR is full",
        "                         -> remove something",
    ]
    many = table([Finding("gpus", "failed", "7 visible", hosts=tuple(f"n{index}" for index in range(12)))], 64)
    assert "n0, n1, n2, n3, n4, n5, n6, n7 and 4 more: 7 visible" in many
    assert "n1" not in table(findings, 1), "one machine needs no name"
    wide = table([Finding("x", "ok", "word " * 60)])
    assert max(map(len, wide.splitlines())) <= 120
