"""The JSON Schema accepts what accel accepts, by the word of an independent validator."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest
import yaml

from accel.cli import main
from accel.cli.schema import schema
from accel.config import Config, describe, read_file
from accel.errors import AccelError
from accel.plan import Plan

from ..package_site import PackageSite, on_path

PLUGIN = """
from dataclasses import dataclass
from typing import Literal
from accel.interfaces import Tracker

class Plugin(Tracker):
    '''Needs to know where.'''

    @dataclass(frozen=True, kw_only=True)
    class Options(Tracker.Options):
        '''Options.'''

        where: str
        mode: Literal["on", "off"] = "on"
        betas: tuple[float, float] = (0.9, 0.99)
        tags: tuple[str, ...] = ()
        limit: int | None = None
"""

TEXTS = [
    "",
    "num_processes: 2",
    "num_processes: 0",
    "num_processes: two",
    "num_processes: true",
    "num_proceses: 2",
    "- 1",
    "mixed_precision: bf16",
    "mixed_precision: no",
    "mixed_precision: 'no'",
    "mixed_precision: yes",
    "mixed_precision: int3",
    "mixed_precision: {fp16: {initial_scale: 1024, dynamic: false}}",
    "mixed_precision: {fp16: {initial_scale: 1e3}}",
    "mixed_precision: {fp16: {initial_scale: big}}",
    "mixed_precision: {fp16: {initial_scale: 0}}",
    "mixed_precision: {fp16: }",
    "mixed_precision: {fp16: 3}",
    "mixed_precision: {fp16: {}, bf16: {}}",
    "strategies: ddp",
    "strategies: [ddp]",
    "strategies: {ddp: {bucket_size: 50}}",
    "strategies: [{ddp: {bucket_size: 50}}]",
    "strategies: {ddp: {bucket: 50}}",
    "strategies: nowhere",
    "strategies: no",
    "device: cpu",
    "device: null",
    "device: no",
    "even_batches: false",
    "even_batches: 0",
    "main_process_port: 29500",
    "main_process_port: null",
    "main_process_port: 0",
    "project_dir: runs",
    "project_dir: 2024",
    "trackers: []",
    "trackers: {where: {where: here}}",
    "trackers: where",
    "trackers: {where: {where: here, mode: off}}",
    "trackers: {where: {where: here, mode: 'off', betas: [0, 1], tags: [a], limit: 3}}",
    "trackers: {where: {where: here, betas: [0, 1, 2]}}",
    "trackers: {where: {where: here, tags: [1]}}",
    "trackers: {where: {mode: 'on'}}",
]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PackageSite]:
    site = PackageSite(tmp_path)
    site.install("where-tracker", "tracker", "where", PLUGIN)
    with on_path(site, monkeypatch):
        yield site


@pytest.mark.parametrize("text", TEXTS)
def test_the_schema_agrees_with_the_parser(site: PackageSite, text: str) -> None:
    (site.folder / "run.yaml").write_text(text)
    try:
        Plan.of(Config.parse(read_file(site.folder / "run.yaml")))
        accepted = True
    except AccelError:
        accepted = False
    validator = jsonschema.Draft202012Validator(schema())
    assert validator.is_valid(yaml.safe_load(text)) is accepted


def test_both_verdicts_occur(site: PackageSite) -> None:
    validator = jsonschema.Draft202012Validator(schema())
    verdicts = [validator.is_valid(yaml.safe_load(text)) for text in TEXTS]
    assert verdicts.count(True) > 15
    assert verdicts.count(False) > 15


def test_it_is_a_schema_that_explains_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "schema"]) == 0
    printed = json.loads(capsys.readouterr().out)
    jsonschema.Draft202012Validator.check_schema(printed)
    assert {name: found["description"] for name, found in printed["properties"].items()} == {
        declared.name: declared.meaning for declared in describe(Config)
    }
