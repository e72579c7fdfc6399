"""Rows of tokens to a .npy file of which nobody knows beforehand how long it will be."""

from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Bool, Integer
from tqdm import tqdm

SCAN = 4096  # rows whose content is counted at a time


class RowFile:
    """Tokens in, rows of one width out into a .npy file, until there is enough content."""

    def __init__(
        self,
        file: BinaryIO,
        width: int,
        dtype: np.dtype[Any],
        special: Bool[np.ndarray, " vocab"],
        need: int,
        bar: "tqdm[Any]",
    ) -> None:
        self.file, self.width, self.dtype, self.special = file, width, dtype, special
        self.need, self.bar = need, bar
        self.rows, self.content, self.documents, self.header = 0, 0, 0, 0
        self._left = np.empty(0, dtype)
        self._write_header()

    @property
    def full(self) -> bool:
        """Whether there is enough."""
        return self.content >= self.need

    @property
    def share(self) -> float:
        """How full, of 1."""
        return self.content / self.need if self.need else 1.0

    def add(self, ids: Integer[np.ndarray, " tokens"]) -> None:
        """Take the tokens that follow those before; what is more than needed is dropped."""
        flat = np.concatenate([self._left, ids.astype(self.dtype)])
        whole = len(flat) - len(flat) % self.width
        rows, self._left = flat[:whole].reshape(-1, self.width), flat[whole:]
        for i in range(0, len(rows), SCAN):
            self._write(rows[i : i + SCAN])

    def _write(self, rows: Integer[np.ndarray, "rows width"]) -> None:
        upto = self.content + np.cumsum((~self.special[rows]).sum(1))
        taken = int(np.searchsorted(upto, self.need)) + 1 if not self.full else 0
        rows = rows[:taken]
        if len(rows):
            self.file.write(rows.tobytes())
            before = min(self.content, self.need)
            self.content = int(upto[len(rows) - 1])
            self.rows += len(rows)
            self.bar.update(min(self.content, self.need) - before)

    def finish(self) -> None:
        """Write how many rows there are."""
        self.file.seek(0)
        before = self.header
        self._write_header()
        assert self.header == before, "numpy leaves room for the number of rows to grow"

    def _write_header(self) -> None:
        shape = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.rows, self.width)}
        np.lib.format.write_array_header_1_0(self.file, shape)
        self.header = self.file.tell()
