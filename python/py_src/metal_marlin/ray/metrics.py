"""Metrics of several servers as those of one, in the text formats of Prometheus and OpenMetrics."""

from __future__ import annotations

import re
from collections.abc import Mapping

_COMMENT = re.compile(r"# (?:HELP|TYPE|UNIT) (\S+)")
#: Ends a text of OpenMetrics.
_END = "# EOF"
_SAMPLE = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? (.+)")


def merge(texts: Mapping[str, str]) -> str:
    """All samples, each with the label ``replica``; those of one metric together, as the format wants them.

    Args:
        texts: What the servers tell, by the names of their replicas.
    """
    comments: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for replica, text in texts.items():
        metric = ""
        for line in text.splitlines():
            comment = _COMMENT.match(line)
            sample = _SAMPLE.fullmatch(line)
            if comment:
                metric = comment[1]
                told = comments.setdefault(metric, [])
                if line not in told:
                    told.append(line)
            elif sample:
                name, labels, value = sample.groups()
                # Samples of a histogram have longer names than the metric.
                metric = metric if metric and name.startswith(metric) else name
                comments.setdefault(metric, [])
                of_replica = f'replica="{replica}"' + (f",{labels}" if labels else "")
                samples.setdefault(metric, []).append(f"{name}{{{of_replica}}} {value}")
    lines = [line for metric, told in comments.items() for line in [*told, *samples.get(metric, [])]]
    lines += [_END] if any(_END in text for text in texts.values()) else []
    return "".join(f"{line}\n" for line in lines)
