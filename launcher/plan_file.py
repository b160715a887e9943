"""A plan as a file of its own: `ftplan plan --out plan.yaml`, then `ftplan launch plan.yaml`.

It holds what was planned for what, and every setting with its reason. Read back, each setting is
kept as it stands, so that a plan may be looked at, changed by hand, and carried elsewhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct, structs

from ftplan.launcher.data.asked import DataAsked, checked_share
from ftplan.launcher.planning import Planned
from ftplan.launcher.run_dir import read_mapping, write_yaml
from ftplan.launcher.version import version
from ftplan.planner.errors import InputError, UnknownNameError
from ftplan.planner.hardware_spec import Network
from ftplan.planner.plan import SETTING_NAMES, Reason, ReasonedPlan, typed_setting

SCHEMA = 1
_COMMENT = "Carry it out with `ftplan launch`; a setting that is left out is chosen anew."
_PARTS = ("schema", "ftplan", "model", "data", "device", "plan")
_RATES = ("bytes_per_second", "latency_seconds")
_DATA_FIELDS = ("paths", "eval_paths", "columns", "strict", "test_share", "sha256")


class PlanFile(Struct, frozen=True, kw_only=True):
    """What a plan file says. `reasons`: of settings that stand there with one. `device` and
    `free_bytes`: what it was planned for, and the memory that was free on it. `interconnect`: what
    joins several machines; `network`: that, where the catalog has it otherwise or not at all."""

    model: str
    asked: DataAsked
    sha256: str | None
    settings: Mapping[str, Any]
    reasons: Mapping[str, Reason]
    device: str = ""
    free_bytes: int | None = None
    interconnect: str | None = None
    network: Network | None = None

    def with_reasons(self, planned: Planned) -> Planned:
        """The plan that came of the file, its reasons those of the file where they were kept."""
        return with_reasons(planned, self.reasons)


def with_reasons(planned: Planned, reasons: Mapping[str, Reason]) -> Planned:
    """The plan with other reasons for some of its settings."""
    reasoned = planned.chosen.reasoned
    kept = {name: reason for name, reason in reasons.items() if name in reasoned.reasons}
    again = ReasonedPlan(plan=reasoned.plan, reasons={**reasoned.reasons, **kept})
    return structs.replace(planned, chosen=structs.replace(planned.chosen, reasoned=again))


def write_plan_file(planned: Planned, path: Path) -> None:
    """Raises InputError where the file is there already or cannot be written."""
    check_new(path)
    device = planned.device
    write_yaml(
        path,
        {
            "schema": SCHEMA,
            "ftplan": version(),
            "model": model_name(planned),
            "data": data_part(planned),
            "device": {
                "name": device.name,
                "free_bytes": device.free_bytes,
                **(_network_part(planned) if device.network else {}),
            },
            "plan": planned.chosen.reasoned.to_dict(),
        },
        _COMMENT,
    )


def check_new(path: Path) -> None:
    """Raises InputError where the file is there already."""
    if path.exists():
        raise InputError(f"`{path}` is there already", "name another file, or remove it")


def model_name(planned: Planned) -> str:
    """What finds the plan's model again."""
    source = planned.source
    return source.hub_id or (str(source.folder) if source.folder else source.spec.name)


def data_part(planned: Planned) -> dict[str, Any]:
    """`data` of a plan file."""
    asked = planned.asked
    return {
        "paths": [absolute(name) for name in asked.paths],
        "eval_paths": [absolute(name) for name in asked.eval_paths],
        "columns": dict(asked.columns),
        "strict": asked.strict,
        "test_share": asked.test_share,
        "sha256": planned.data.sha256,
    }


def absolute(name: str) -> str:
    """A file's path from anywhere; a dataset's name on the Hub as it is."""
    path = Path(name)
    return str(path.resolve()) if path.exists() else name


def read_plan_file(path: Path) -> PlanFile:
    """Raises InputError that names what is wrong, and where."""
    raw = read_mapping(path)
    check_known(raw, _PARTS, f"part of `{path.name}`")
    model = checked_model(path, raw)
    data, plan = raw.get("data"), raw.get("plan")
    if not isinstance(data, Mapping) or not isinstance(plan, Mapping):
        raise InputError(f"`{path}` lacks `data` or `plan`", "see `ftplan plan DATA --out FILE`")
    settings, reasons = read_settings(plan)
    return PlanFile(
        model=model,
        asked=read_asked(path, data),
        sha256=data.get("sha256"),
        settings=settings,
        reasons=reasons,
        **_device_part(path, raw.get("device") or {}),
    )


def _device_part(path: Path, device: Any) -> dict[str, Any]:
    free = device.get("free_bytes") if isinstance(device, Mapping) else "?"
    if free is not None and not isinstance(free, int):
        raise InputError(f"`{path}`: `device` has a `name` and a number of `free_bytes`")
    name, interconnect = str(device.get("name", "")), device.get("interconnect")
    said = {"device": name, "free_bytes": free, "interconnect": interconnect}
    rates = [device[field] for field in _RATES if field in device]
    if not rates:
        return said
    if len(rates) < len(_RATES) or not all(_is_rate(rate) for rate in rates):
        raise InputError(f"`{path}`: `device` has two numbers above 0, {' and '.join(_RATES)}")
    own = Network(name=str(interconnect), **dict(zip(_RATES, rates, strict=True)))
    return {**said, "network": own}


def _is_rate(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e30


def _network_part(planned: Planned) -> dict[str, Any]:
    """What joins the plan's machines: a name of the catalog, or the name of what was described
    (`--cluster`) with its figures."""
    from ftplan.profiles import find_network

    network, plan = planned.device.network, planned.chosen.plan
    assert network is not None
    with contextlib.suppress(UnknownNameError):
        if find_network(network.name, plan.gpus_per_machine) == network:
            return {"interconnect": network.name}
    return {"interconnect": network.name, **{name: getattr(network, name) for name in _RATES}}


def checked_model(path: Path, raw: Mapping[str, Any]) -> str:
    """The model that a file of this version names; raises InputError for another version."""
    if raw.get("schema") != SCHEMA:
        raise InputError(
            f"`{path}` has `schema: {raw.get('schema')}`, and this ftplan reads {SCHEMA}",
            "make it again with `ftplan plan DATA --out plan.yaml`",
        )
    model = raw.get("model")
    if not isinstance(model, str):
        raise InputError(f"`{path}` names no `model`", "a catalog name, a Hub id or a folder")
    return model


def check_known(given: Mapping[str, Any], known: tuple[str, ...], what: str) -> None:
    for name in given:
        if name not in known:
            raise UnknownNameError(what, str(name), known)


def read_asked(path: Path, data: Mapping[str, Any]) -> DataAsked:
    check_known(data, _DATA_FIELDS, f"part of `data` in `{path.name}`")
    paths, eval_paths = data.get("paths"), data.get("eval_paths") or []
    columns, share = data.get("columns") or {}, data.get("test_share", 0.0)
    names = (
        [*paths, *eval_paths] if isinstance(paths, list) and isinstance(eval_paths, list) else []
    )
    if not paths or not names or not all(isinstance(name, str) for name in names):
        raise InputError(f"`{path}`: `data.paths` must be a list of files")
    if not isinstance(columns, Mapping) or not isinstance(share, int | float):
        raise InputError(f"`{path}`: `data.columns` is a mapping, `data.test_share` a number")
    return DataAsked(
        paths=tuple(paths),
        eval_paths=tuple(eval_paths),
        columns={str(name): str(value) for name, value in columns.items()},
        strict=bool(data.get("strict", False)),
        test_share=checked_share(share),
    )


def read_settings(plan: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Reason]]:
    """Values, and the reasons that stand beside them; a bare value is one that was given."""
    settings: dict[str, Any] = {}
    reasons: dict[str, Reason] = {}
    check_known(plan, SETTING_NAMES, "plan setting")
    for name, entry in plan.items():
        if isinstance(entry, Mapping):
            check_known(entry, ("value", "from", "why"), f"part of plan setting `{name}`")
            if "value" not in entry:
                raise InputError(f"plan setting `{name}` has no `value`")
            value = entry["value"]
            if entry.get("from") in ("given", "derived", "default") and entry.get("why"):
                reasons[name] = Reason(origin=entry["from"], why=str(entry["why"]))
        else:
            value = entry
        settings[name] = typed_setting(name, value)
    return settings, reasons
