"""Published tasks, one file for each data set: prompts of MeZO (arXiv 2305.17333) and LM-BFF (arXiv 2012.15723)."""

from __future__ import annotations

from zo_ds.tasks.library.boolq import BOOLQ
from zo_ds.tasks.library.cb import CB
from zo_ds.tasks.library.copa import COPA
from zo_ds.tasks.library.drop import DROP
from zo_ds.tasks.library.mnli import MNLI_MASKED
from zo_ds.tasks.library.multirc import MULTIRC
from zo_ds.tasks.library.record import RECORD
from zo_ds.tasks.library.rte import RTE, RTE_MASKED
from zo_ds.tasks.library.snli import SNLI_MASKED
from zo_ds.tasks.library.squad import SQUAD
from zo_ds.tasks.library.sst2 import SST2, SST2_MASKED
from zo_ds.tasks.library.sst5 import SST5_MASKED
from zo_ds.tasks.library.trec import TREC_MASKED
from zo_ds.tasks.library.wic import WIC
from zo_ds.tasks.library.wsc import WSC
from zo_ds.tasks.task import Task

_CAUSAL = (SST2, RTE, CB, BOOLQ, WSC, WIC, MULTIRC, COPA, RECORD, SQUAD, DROP)
_MASKED = (SST2_MASKED, SST5_MASKED, SNLI_MASKED, MNLI_MASKED, RTE_MASKED, TREC_MASKED)

PUBLISHED: dict[str, Task] = {task.name: task for task in (*_CAUSAL, *_MASKED)}
"""In the order of the published tables; those with ``-masked`` in their name are asked through a mask."""
