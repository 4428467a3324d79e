"""The commands for an output root: `status`, `verify`, `retry`, `withdraw`, `gc` and `diff`.

They read storage only and need no Ray, except `verify --repair`, which renders again what it has removed. Commands that
change the root only report what they would do, unless a flag asks for the change. While they change the root they hold
its lease, so that no driver works there at the same time.

Exit codes: 0 no problem, 3 faults or differences, 1 the command failed; `verify --repair` has those of `run`.
"""
