"""Export: a quantized model as a file that a runtime executes, checked in that runtime.

`export` lowers the frozen graph (`passes/lower.py`), lets an `Exporter` write it, runs what was
written against the graph, and counts its cost again. Every format is one file of this package that
registers an `Exporter`; packages that a format needs are imported when it is used.
"""

from cgmq_fx.exporters.agreement import Agreement
from cgmq_fx.exporters.api import Exported, export
from cgmq_fx.exporters.exporter import Exporter, Source, exporters, find_exporter, register_exporter

__all__ = [
    "Agreement",
    "Exported",
    "Exporter",
    "Source",
    "export",
    "exporters",
    "find_exporter",
    "register_exporter",
]
