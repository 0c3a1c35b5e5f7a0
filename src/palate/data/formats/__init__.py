"""Public shapes of records, one short file each: ``detect(record) -> bool`` and ``convert(record, kind, source)``.

``detect_format`` names the shape of a record, ``convert_record`` reads it, ``convert_file`` rewrites a file as palate's
own JSONL.
"""

from palate.data.formats.convert import ConvertReport, convert_file, iterate_records
from palate.data.formats.detect import FORMATS, convert_record, detect_format, find_format

__all__ = [
    "FORMATS",
    "ConvertReport",
    "convert_file",
    "convert_record",
    "detect_format",
    "find_format",
    "iterate_records",
]
