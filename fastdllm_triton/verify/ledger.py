"""What has been verified on a machine: a file that holds each record as soon as it is there, to go on with and to rely on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..utils.files import naming, write_json
from .records import Record

#: What must be the same where records are to hold for another run.
SAME = ("device", "commit", "torch", "triton")


@dataclass
class Ledger:
    """Records of one machine and commit.

    Attributes:
        machine: see :func:`fastdllm_triton.tools.environment.describe`.
        quick: whether only a part is tried.
        path: where they are kept, if anywhere.
        records: so far.
    """

    machine: Mapping[str, Any]
    quick: bool
    path: Path | None = None
    records: list[Record] = field(default_factory=list)

    @classmethod
    def load(cls, path: Path) -> Ledger:
        """Reads a file.

        Raises:
            OSError: it cannot be read.
            ValueError: it holds something else.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(content["machine"], content["quick"], path, [Record.from_json(record) for record in content["records"]])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no verification: {type(error).__name__}: {error}") from None

    def check_same(self, machine: Mapping[str, Any], option: str) -> None:
        """Checks that the records are of this machine, commit and versions.

        Raises:
            ValueError: it names the option and the difference.
        """
        for name in SAME:
            if self.machine.get(name) != machine[name]:
                there = f"{self.path} was made with {name} = {self.machine.get(name)}"
                raise ValueError(f"{option}: {there}, here it is {machine[name]}")

    def resume(self) -> None:
        """Takes over the records of the file, if there is one; those of a quick run only if this one is quick too.

        Raises:
            ValueError: the file is damaged, or of another machine.
        """
        assert self.path is not None
        if self.path.exists():
            earlier = Ledger.load(self.path)
            earlier.check_same(self.machine, "--resume")
            self.records = earlier.records if self.quick or not earlier.quick else []

    def add(self, record: Record) -> None:
        self.records.append(record)
        self.write()

    def write(self) -> None:
        """Writes the file, if there is to be one.

        Raises:
            OSError: it cannot be written; says that ``--out`` named it.
        """
        if self.path is not None:
            with naming("--out", self.path):
                write_json(self.path, self.as_json())

    def as_json(self) -> dict[str, Any]:
        records = [record.as_json() for record in self.records]
        return {"ok": all(record.ok for record in self.records), "machine": self.machine, "quick": self.quick, "records": records}


def proven(paths: Sequence[Path], machine: Mapping[str, Any]) -> list[Record]:
    """The records of files of this machine; where several hold a check, the last one counts.

    Raises:
        OSError, ValueError: as :meth:`Ledger.load` and :meth:`Ledger.check_same`.
    """
    records: dict[tuple[str, str], Record] = {}
    for path in paths:
        try:
            ledger = Ledger.load(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"--verified: {error}") from None
        ledger.check_same(machine, "--verified")
        records |= {record.key: record for record in ledger.records}
    return list(records.values())
