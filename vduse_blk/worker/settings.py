"""What of a disk can be changed while it is in use: its failure policy, and the options of its filters.

Keys are ``on-error``, ``on-full`` and ``FILTER.OPTION``; an empty value puts the default back. All of a change is made or
nothing.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from vduse_blk.block.contract import Filter
from vduse_blk.block.errors import UserError
from vduse_blk.block.options import make_options, parse_values, write_values
from vduse_blk.block.policy import Policy
from vduse_blk.block.stack import Stack
from vduse_blk.control.spec import WorkerSpec

log = logging.getLogger("vduse_blk.disk")

_DEFAULTS = {"on_error": None, "on_full": "fail"}


def change(stack: Stack, spec: WorkerSpec, values: Mapping[str, str]) -> WorkerSpec:
    """Make the change; returns the specification of the disk as it is now. Raises UserError with nothing changed."""
    filters = stack.filters
    words: dict[str, str | None] = {}
    options: dict[str, dict[str, str]] = {}
    for key, value in values.items():
        layer, dot, option = key.partition(".")
        word = key.replace("-", "_")
        if not dot and word in _DEFAULTS and "_" not in key:  # one name of a key: what is set later is what counts
            words[word] = value or _DEFAULTS[word]
        elif dot and layer in filters:
            options.setdefault(layer, {})[option] = value
        else:
            accepted = ", ".join(["on-error", "on-full", *(f"{name}.OPTION" for name in filters)])
            raise UserError(f"{key}: cannot be set while the disk is in use; accepted are {accepted}")
    changed = dataclasses.replace(spec, **words)  # type: ignore[arg-type]
    on_error = stack.default_on_error if changed.on_error is None else changed.on_error
    policy = Policy.parse(on_error, changed.on_full)
    with ExitStack() as undo:
        for name, given in options.items():
            layer_changed = _changed_options(filters[name], given)
            undo.callback(filters[name].change, filters[name].options)
            filters[name].change(layer_changed)
        undo.pop_all()
    if policy != stack.patience.policy:
        stack.patience.change(policy)
    texts = []
    for kind, query in ((filter.kind, write_values(filter.options)) for filter in filters.values()):
        texts.append(f"{kind}?{query}" if query else kind)
    return dataclasses.replace(changed, filters=tuple(texts))


def restore(stack: Stack, spec: WorkerSpec, values: Mapping[str, str]) -> WorkerSpec:
    """``change`` to what was set in another server of the disk. What this one does not know (a filter that it was not given,
    an option of another version) is said in the log: a disk that is not served at all would be worse."""
    for key, value in values.items():
        try:
            spec = change(stack, spec, {key: value})
        except UserError as error:
            log.warning("disk '%s': what was set before, %s=%s, is not any more: %s", spec.name, key, value, error)
    return spec


def facts(stack: Stack) -> dict[str, Any]:
    """For ``info``: what is set now."""
    return {
        "policy": stack.patience.policy.facts(),
        "filters": [
            {"name": name, "options": write_values(layer.options), **layer.facts()}
            for name, layer in stack.filters.items()
        ],
    }


def _changed_options(layer: Filter, given: Mapping[str, str]) -> Any:
    """Options of a filter with some of them changed. Raises UserError."""
    fields = dataclasses.fields(layer.Options)
    present = {field.name: getattr(layer.options, field.name) for field in fields}
    parse_values(layer.kind, layer.Options, {key: value for key, value in given.items() if value or key not in present})
    values = {key: value for key, value in present.items() if value is not None}
    for key, value in given.items():
        values.pop(key, None)
        if value:
            values[key] = value
    return make_options(layer.kind, layer.Options, values)
