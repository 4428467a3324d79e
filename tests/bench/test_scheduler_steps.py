"""hv_batch.bench.scheduler_steps: the bench runs, and a step costs the same with few and with many groups."""

from __future__ import annotations

import sys

from hv_batch.bench.scheduler_steps import SteadyRun, bench_scheduler


def instructions(groups, tasks):
    """Executed Python instructions of a step, on average: a measure of time that does not depend on the machine."""
    run = SteadyRun(groups)
    count = 0

    def trace(frame, event, _argument):
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return trace

    step = run.scheduler.step

    def traced(*arguments):
        sys.settrace(trace)
        try:
            return step(*arguments)
        finally:
            sys.settrace(None)

    run.scheduler.step = traced
    steps, _ = run.run(tasks)
    return count / steps


def test_a_step_costs_the_same_with_many_groups():
    """Design section 2: the driver of a thousand GPUs takes hundreds of events a second."""
    few, many = instructions(40, 60), instructions(640, 60)
    assert many < 1.2 * few, "the scheduler looks at every worker in a step"


def test_the_bench_reports_each_number_of_groups():
    few, many = bench_scheduler([2, 30], tasks=20, rounds=3)
    assert (few.groups, few.ratio, many.groups) == (2, 1.0, 30)
    assert many.microseconds > 0
    assert many.steps > 60
