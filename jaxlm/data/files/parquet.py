"""Columns of a parquet file of examples: only those that a task needs are read, whatever is in the others."""

import pyarrow as pa

from jaxlm.data.files.example_files import Opened, read_bytes
from jaxlm.errors import DataError

TIMES = ("TIMESTAMP", "DATE", "TIME")  # logical types


def open_parquet(file: Opened):
    """A pyarrow.parquet.ParquetFile. Raises DataError where it is none."""
    import pyarrow.parquet  # late: its threads make an arena of malloc's, see jaxlm/run/process.py

    if file.compression:
        source = pa.BufferReader(read_bytes(file))
    else:
        source = file.path
    try:
        return pyarrow.parquet.ParquetFile(source)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file.path}: not a parquet file: {error}") from None


def read_columns(path: str, table, names: list[str]) -> dict[str, list]:
    """The columns of these names, as Python values. Raises DataError with the row and the column of a bad value."""
    for name in names:
        if table.schema_arrow.names.count(name) > 1:
            raise DataError(
                f"{path}: it has {table.schema_arrow.names.count(name)} columns of the name {name}"
            )
        refuse_type(path, name, table.schema_arrow.field(name).type)
    try:
        read = table.read(columns=leaves_of(table, names))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: {' and '.join(names)} can't be read: {error}") from None
    return {name: values_of(path, name, read.column(name)) for name in names}


def leaves_of(table, names: list[str]) -> list[str]:
    """The paths of these columns and of all within them but times, such as those of a message."""
    paths = []
    for number in range(len(table.schema)):
        leaf = table.schema.column(number)
        times = leaf.logical_type.type in TIMES or leaf.physical_type == "INT96"
        if leaf.path in names or (leaf.path.partition(".")[0] in names and not times):
            paths.append(leaf.path)
    return paths


def refuse_type(path: str, name: str, kind: pa.DataType) -> None:
    """Raises DataError for a column of times: they have many spellings, and none is a text."""
    if pa.types.is_temporal(value_type(kind)):
        raise DataError(
            f"{path}:1: its column {name} holds times ({kind}), not text or numbers; write them as the text that is to "
            "be learned"
        )


def value_type(kind: pa.DataType) -> pa.DataType:
    """The type of the values, which a dictionary keeps once."""
    if pa.types.is_dictionary(kind):
        return kind.value_type
    return kind


def is_text(kind: pa.DataType) -> bool:
    """Whether values of a type of Arrow's are text, or bytes that may be."""
    kind = value_type(kind)
    string = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    return string or pa.types.is_string_view(kind) or is_bytes(kind)


def is_bytes(kind: pa.DataType) -> bool:
    kind = value_type(kind)
    plain = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    return plain or pa.types.is_binary_view(kind) or pa.types.is_fixed_size_binary(kind)


def values_of(path: str, name: str, column: pa.ChunkedArray) -> list:
    """A column as Python values, binary as the UTF-8 text that it is."""
    try:
        values = column.to_pylist()
        if holds_bytes(column.type):
            values = list(map(as_text, values))
        return values
    except (ValueError, OverflowError, pa.ArrowException):
        pass  # the first row that cannot be read is looked for
    for row, value in enumerate(column, 1):
        try:
            as_text(value.as_py())
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}:{row}: its column {name} is not UTF-8 text: {error.reason}"
            ) from None
        except (ValueError, OverflowError, pa.ArrowException) as error:
            raise DataError(
                f"{path}:{row}: its column {name} ({column.type}) can't be read: {error}"
            ) from None
    raise DataError(f"{path}: its column {name} ({column.type}) can't be read")


def holds_bytes(kind: pa.DataType) -> bool:
    return "binary" in str(kind)  # also within lists and structs


def as_text(value):
    """The value with bytes decoded, also within lists and dicts. Raises UnicodeDecodeError."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, list):
        return [as_text(item) for item in value]
    if isinstance(value, dict):
        return {key: as_text(item) for key, item in value.items()}
    return value
