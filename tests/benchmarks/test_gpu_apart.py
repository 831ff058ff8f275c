"""A process for work that may crash, hang or raise: it costs that work, and the next is done."""

from __future__ import annotations

import operator
import os
import time

import pytest

from benchmarks.gpu.apart import Apart, Failed


def test_work_that_fails_costs_itself_alone() -> None:
    with Apart() as apart:
        assert apart.run(operator.add, 1, 2, seconds=60) == 3
        with pytest.raises(Failed, match="ZeroDivisionError: division by zero") as raised:
            apart.run(operator.truediv, 1, 0, seconds=60)
        assert "apart.py" in raised.value.trace
        first = apart.run(os.getpid, seconds=60)
        assert apart.run(os.getpid, seconds=60) == first != os.getpid()
        with pytest.raises(Failed, match="no answer within 1 s: its process was ended"):
            apart.run(time.sleep, 600, seconds=1)
        with pytest.raises(Failed, match="its process ended: exit 3"):
            apart.run(os._exit, 3, seconds=60)
        with pytest.raises(Failed, match="its process ended: SIGABRT"):
            apart.run(os.abort, seconds=60)
        assert apart.run(operator.add, 3, 4, seconds=60) == 7
