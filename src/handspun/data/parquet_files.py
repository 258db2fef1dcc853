"""The rows of a parquet file."""

from pathlib import Path
from typing import Any

from handspun.data.arrow_values import cell_reader
from handspun.data.memory_limit import memory_limit
from handspun.data.naming import file_name, shown
from handspun.data.text_files import check_kind
from handspun.errors import DataError

_ROWS_AT_ONCE = 1024
_BYTES_OF_A_CELL = 100
"""Of a Python object, at least, whatever few bytes of a file it comes from."""


def read_parquet(path: Path) -> list[dict[str, Any]]:
    """The table's rows. Nulls inside of nested values are left out, see `cell_reader`.

    A file of kilobytes can hold a billion rows, or a long text a million times: what they take in memory is
    counted as they are unpacked. Raises DataError.
    """
    import pyarrow
    import pyarrow.parquet

    file = file_name(path)
    with path.open("rb") as stream:
        check_kind(stream.read(32), file, but=b"PAR1")
    rows: list[dict[str, Any]] = []
    unpacked, most = 0, memory_limit()
    try:
        with pyarrow.parquet.ParquetFile(path) as parquet:
            _check_unique(parquet.schema_arrow.names, file)
            for batch in parquet.iter_batches(_ROWS_AT_ONCE):
                unpacked += batch.nbytes + batch.num_rows * batch.num_columns * _BYTES_OF_A_CELL
                if most is not None and unpacked > most:
                    raise DataError(
                        f"its {parquet.metadata.num_rows} rows unpack to more than the {most / 1e9:.0f} GB of "
                        "memory that are here. Split it, or take a part of it.",
                        file=file,
                    )
                rows += _rows(batch, len(rows), file)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"this is no whole parquet file: {error}. It may be cut short; write or download it again.",
            file=file,
        ) from error
    return rows


def _rows(batch: Any, before: int, file: str) -> list[dict[str, Any]]:
    """The rows of an Arrow batch, `before` of the file's rows having been read."""
    names = batch.schema.names
    columns = [_cells(batch.column(i), name, before, file) for i, name in enumerate(names)]
    return [dict(zip(names, cells, strict=True)) for cells in zip(*columns, strict=True)]


def _cells(column: Any, name: str, before: int, file: str) -> list[Any]:
    """Raises DataError where Python has no such value: text that is not UTF-8, the year 300000."""
    read = cell_reader(column.type)
    try:
        return [read(cell) for cell in column.to_pylist(maps_as_pydicts="strict")]
    except Exception:  # whatever Arrow raises for one of its many types
        for number, cell in enumerate(column, before + 1):
            try:
                read(cell.as_py(maps_as_pydicts="strict"))
            except Exception as error:
                raise DataError(
                    f"the value cannot be read: {error}. Mend it, or write the file without the column.",
                    file=file,
                    row=number,
                    column=shown(name),
                ) from error
        raise


def _check_unique(names: list[str], file: str) -> None:
    if len(set(names)) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise DataError(f"two columns are named '{shown(twice)}'; each name is expected once.", file=file)
