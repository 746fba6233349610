"""Data: tables and images read with care, their diagnosis, and toys with known densities."""

from rootflow.data.cells import Mixed
from rootflow.data.columns import ColumnReport, describe_columns
from rootflow.data.detect import Declared, declare, detect
from rootflow.data.feed import Feed, encoded
from rootflow.data.images import IMAGES, Images, read_images
from rootflow.data.packaged import PACKAGED
from rootflow.data.prepared import PREPARED
from rootflow.data.published import prepare
from rootflow.data.schema import Schema
from rootflow.data.tables import BUILTIN, Table, read_table, require_rows, split, write_table
from rootflow.data.toys import TOYS, Toy

__all__ = [
    "BUILTIN",
    "IMAGES",
    "PACKAGED",
    "PREPARED",
    "TOYS",
    "ColumnReport",
    "Declared",
    "Feed",
    "Images",
    "Mixed",
    "Schema",
    "Table",
    "Toy",
    "declare",
    "describe_columns",
    "detect",
    "encoded",
    "prepare",
    "read_images",
    "read_table",
    "require_rows",
    "split",
    "write_table",
]
