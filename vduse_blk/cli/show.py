"""``list`` and ``info``: what disks there are and how they do."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping
from datetime import datetime
from importlib import import_module
from typing import Any, Final

import click

from vduse_blk.block.errors import UserError
from vduse_blk.cli import output
from vduse_blk.cli.completion import complete_names
from vduse_blk.cli.options import json_option
from vduse_blk.control.errors import ControlError
from vduse_blk.control.process import is_running
from vduse_blk.control.rundir import DiskPaths
from vduse_blk.control.spec import WorkerSpec
from vduse_blk.control.status import DiskStatus, all_disks, disk_status

STATE_STYLES: Final = {
    "serving": "green",
    "dead": "red",
    "dying": "red",
    "silent": "red",
    "broken": "red",
    "unreadable": "red",
    "starting": "yellow",
    "waiting": "yellow",
}
MAX_QUEUE_COLUMNS: Final = 8
_PLAIN: Final = ("device", "kernel_name", "source", "path", "serial")


@click.command("list", short_help="List all disks.")
@json_option
def list_disks(as_json: bool) -> None:
    """List every disk of this host, those whose server died included.

    STATE is what the server says of itself ('starting', 'serving', 'waiting', 'broken', 'detaching'), 'dead' if there is
    no server, 'dying' if it was killed and has not ended, 'silent' if there is one that does not answer, and 'unreadable'
    without access to the disk's directory.
    """
    disks = list(all_disks())
    if as_json:
        output.print_json({"ok": True, "disks": [_as_json(disk) for disk in disks]})
        return
    if not disks:
        output.say("no disks")
        return
    output.print_table(
        ("NAME", "DEVICE", "SIZE", "PATH", "QUEUES", "SOURCE", "PID", "STATE"),
        [_row(disk) for disk in disks],
        STATE_STYLES,
    )


@click.command(short_help="Show everything about one disk.")
@click.argument("name", shell_complete=complete_names)
@json_option
def info(name: str, as_json: bool) -> None:
    """Show everything about the disk NAME: size, source, features, queues, and counters since the attach."""
    disk = disk_status(name, timeout=10)
    if disk.state in ("dead", "dying", "silent"):
        ended = "monitor" in disk.info and not is_running(disk.info["monitor"])
        disk = dataclasses.replace(disk, info={**disk.info, **_looked_at(disk), **({"monitor": None} if ended else {})})
    log = DiskPaths.of(name).log
    if log.exists():  # under a service manager what a server says goes elsewhere
        disk = dataclasses.replace(disk, info={**disk.info, "log": str(log)})
    if as_json:
        output.print_json({"ok": True, **_as_json(disk)})
        return
    print_info(disk)


def _looked_at(disk: DiskStatus) -> dict[str, Any]:
    """What can be seen of a disk without its server, and ``way_out``: the command that leads out of its state."""
    force = f"`vduse-blk detach {disk.name} --force`"
    if disk.state == "silent":
        return {"way_out": f"{force} kills its server and removes it"}
    dying = disk.state == "dying"
    found: dict[str, Any] = import_module("vduse_blk.exporters.vduse.left").look(disk.name)
    if "broken" in found:
        return found
    waited_for = _of_front_ends(disk)
    if not found and not dying and waited_for is None:
        return {"way_out": f"`vduse-blk detach {disk.name}` removes what is left of it"}
    from vduse_blk import record, registry
    from vduse_blk.block.contract import Fence
    from vduse_blk.source import parse_source

    was_killed = "its server was killed and waits in the kernel, probably for storage, until that answers; " if dying else ""
    try:
        known = record.read(disk.name)
        spec = waited_for if known is None else known.spec
        if spec is None:
            raise ControlError("what it was is not known any more")
        if registry.backend(parse_source(spec.source).backend).fence is not Fence.OPEN:
            raise ControlError("its contents are lost")
    except UserError as e:
        return found | {"way_out": f"{was_killed}{e}: {force} fails its requests and removes it"}
    serves = "waits for its end and serves the disk again" if dying else "serves it again"
    if disk.info.get("monitor"):
        spec = dataclasses.replace(spec, restart="on-failure")  # which is not on record
    command = f"`{attach_command(spec)}` {serves}"
    return found | {"way_out": f"{was_killed}{command}; {force} fails its requests and removes it"}


def _of_front_ends(disk: DiskStatus) -> WorkerSpec | None:
    """What the disk is if it was served to front-ends alone: they wait, and the kernel knows nothing of them. Else None."""
    if not isinstance(disk.info.get("spec"), dict) or disk.info.get("phase") in ("starting", "detaching", None):
        return None
    from vduse_blk.exports import parse_exports

    try:
        spec = WorkerSpec.from_json(json.dumps(disk.info["spec"]))
        exports = parse_exports(spec.exports)
    except UserError:
        return None  # damaged
    return None if any(export.exporter.for_this_host for export in exports) else spec


def attach_command(spec: WorkerSpec) -> str:
    """What a person types for such a disk."""
    words = ["vduse-blk", "attach", spec.source, "--name", spec.name]
    words += ["--read-only"] if spec.read_only else []
    for option in ("queues", "queue_size", "serial", "block_size", "path", "on_error", "on_full", "restart"):
        value = getattr(spec, option)
        if value != WorkerSpec.__dataclass_fields__[option].default:
            words += [f"--{option.replace('_', '-')}", str(value)]
    words += [word for text in spec.filters for word in ("--filter", text)]
    if spec.exports != ("vduse",):
        words += [word for export in spec.exports for word in ("--export", export)]
    return shlex.join(words)


def _as_json(disk: DiskStatus) -> dict[str, Any]:
    values = {key: value for key, value in disk.info.items() if key not in ("ok", "phase")}
    if disk.state == "dead":
        values["pid"] = None
    return {"name": disk.name, "state": disk.state} | values | {"name": disk.name}


def _row(disk: DiskStatus) -> tuple[str, ...]:
    know = disk.info
    queues = know.get("queue_count")
    return (
        disk.name,
        str(know.get("device") or "-"),
        output.size_text(know.get("size")),
        str(know.get("path") or "-"),
        "-" if queues is None else str(queues),
        str(know.get("source") or "-"),
        str(know.get("pid") or "-") if disk.state != "dead" else "-",
        disk.state,
    )


def print_info(disk: DiskStatus) -> None:
    """Print one disk for people: its properties, then a table of counters."""
    know = disk.info
    rows = [("name", disk.name), ("state", disk.state)]
    rows += [(key.replace("_", " "), str(know[key])) for key in _PLAIN if know.get(key)]
    rows += [("export", f"{export['export']}") for export in know.get("exports", [])]
    rows += _policy_rows(know)
    rows += [("filter", _filter_text(layer)) for layer in know.get("filters", [])]
    if know.get("frontend"):
        rows.append(("front-end", f"process {know['frontend']}"))
    if know.get("size") is not None:
        rows.append(("size", f"{output.size_text(know['size'])} ({know['size']} bytes)"))
    if know.get("block_size"):
        rows.append(("block size", f"{know['block_size']} bytes"))
    if "read_only" in know:
        rows.append(("read-only", "yes" if know["read_only"] else "no"))
    if disk.state != "dead" and know.get("pid"):
        rows.append(("server", f"process {know['pid']}"))
    if know.get("log"):
        rows.append(("log", str(know["log"])))
    if isinstance(know.get("queues"), list) and know["queues"]:
        rows.append(("queues", _queues_text(know["queues"])))
    if know.get("bounce"):
        rows.append(("bounce area", _bounce_text(know["bounce"])))
    if know.get("started_at"):
        rows.append(("since", _time_text(know["started_at"])))
    if know.get("waiting"):
        rows.append(("waiting", f"{know['waiting']} requests"))
    if know.get("broken"):
        rows.append(("broken", str(know["broken"])))
    if know.get("way_out"):
        rows.append(("way out", str(know["way_out"])))
    if know.get("monitor"):
        rows.append(("monitor", f"process {know['monitor']}"))
    rows += [("" if i else "history", _event_text(event)) for i, event in enumerate(know.get("events", []))]
    if "features_negotiated" in know:
        refused = [f for f in know.get("features_offered", []) if f not in know["features_negotiated"]]
        rows.append(("features", " ".join(know["features_negotiated"])))
        if refused:
            rows.append(("not taken", " ".join(refused)))
    width = max(len(label) for label, _ in rows)
    for label, value in rows:
        click.echo(f"{label.ljust(width)}  {output.printable(value)}")
    _print_counters(know.get("counters"), know.get("queues"))


def _policy_rows(know: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    policy, waiting = know.get("policy"), know.get("waiting")
    if isinstance(policy, Mapping):
        rows.append(("on error", f"{policy.get('on_error')}; no space: {policy.get('on_full')}"))
    if isinstance(waiting, Mapping):
        text = f"{waiting.get('requests')} requests since {_time_text(waiting.get('since'))}: {waiting.get('error')}"
        rows.append(("waiting", text))
    return rows


def _bounce_text(bounce: Mapping[str, Any]) -> str:
    if bounce["memory"] == "server":
        text = f"{output.size_text(bounce['size'])} of the server's memory"
        return f"{text}, looked up for every request: {bounce['not_held']}" if "not_held" in bounce else text
    return f"the kernel's memory: {bounce['because']}"


def _filter_text(layer: Mapping[str, Any]) -> str:
    """'faults?error=EIO (seed 4, struck: read 3)'."""
    facts = []
    for key, value in layer.items():
        if key in ("name", "options") or value in (None, {}, []):
            continue
        if isinstance(value, Mapping):
            facts.append(f"{key}: {' '.join(f'{name} {count}' for name, count in value.items())}")
        else:
            facts.append(f"{key} {value}")
    text = f"{layer.get('name')}?{layer['options']}" if layer.get("options") else str(layer.get("name"))
    return f"{text} ({', '.join(facts)})" if facts else text


def _event_text(event: Mapping[str, Any]) -> str:
    """'2026-11-21 10:00:00 +0000 server 42 was ended by signal 9'."""
    what = f"server {event.get('pid')} "
    match event.get("event"):
        case "ended" if "signal" in event:
            what += f"was ended by signal {event['signal']}"
        case "ended":
            what += f"ended with status {event.get('status')}"
        case "taken over":
            what += f"took over and did {event.get('replayed')} requests again"
        case "upgraded":
            what += f"of version {event.get('version')} took over from one that ran"
        case "given up":
            what = f"no server is started any more: {event.get('servers')} in a row have ended"
        case other:
            what = str(other)
    return f"{_time_text(event.get('time'))} {what}"


def _queues_text(queues: list[Mapping[str, Any]]) -> str:
    """'2 of 256 descriptors', and which of them do not serve requests."""
    if all(queue.get("state") == "unused" for queue in queues):
        return f"{len(queues)}, unused"
    sizes = " or ".join(dict.fromkeys(str(queue.get("size")) for queue in queues if queue.get("size")))
    text = f"{len(queues)} of {sizes} descriptors"
    for state in ("unused", "broken"):
        in_state = [str(queue.get("index")) for queue in queues if queue.get("state") == state]
        if in_state:
            text += f"; {state}: {' '.join(in_state)}"
    return text


def _print_counters(totals: object, queues: object) -> None:
    """One row per counter that has counted, with a column per queue where they fit."""
    if not isinstance(totals, Mapping):
        return
    each = queues if isinstance(queues, list) and 1 < len(queues) <= MAX_QUEUE_COLUMNS else []
    rows = [
        (key.replace("_", " "), str(value), *(str(queue.get("counters", {}).get(key, 0)) for queue in each))
        for key, value in totals.items()
        if value
    ]
    if rows:
        click.echo()
        output.print_table(("COUNTER", "TOTAL", *(f"QUEUE {queue.get('index')}" for queue in each)), rows)


def _time_text(started_at: Any) -> str:
    if not isinstance(started_at, int | float):
        return str(started_at)
    try:
        return datetime.fromtimestamp(started_at).astimezone().strftime("%Y-%m-%d %H:%M:%S %z")
    except (OverflowError, ValueError, OSError):  # no server has written that
        return str(started_at)
