"""Writes metal-marlin.json, a dashboard of what the server tells Prometheus: `python3 dashboard.py`, then import the file in Grafana."""

import json
from pathlib import Path

SOURCE = {"type": "prometheus", "uid": "${source}"}
WIDTH, HEIGHT = 8, 8


def rate(name):
    return f"sum(rate(metal_marlin_{name}_total[$__rate_interval]))"


def quantiles(name):
    expression = "histogram_quantile({}, sum by (le) (rate(metal_marlin_" + name + "_seconds_bucket[$__rate_interval])))"
    return {label: expression.format(q) for label, q in [("half", 0.5), ("9 of 10", 0.9), ("99 of 100", 0.99)]}


PANELS = [
    ("Answers", "short", {"computed": "sum(metal_marlin_requests_running)", "waiting": "sum(metal_marlin_requests_waiting)"}),
    ("Tokens a second", "short", {"generated": rate("generated_tokens"), "of prompts, computed": rate("prompt_tokens"), "of prompts, cached": rate("prefix_cache_hits")}),
    ("Requests a second by status", "reqps", {"{{status}}": "sum by (status) (rate(metal_marlin_http_requests_total[$__rate_interval]))"}),
    ("Time to the first token", "s", quantiles("time_to_first_token")),
    ("Time between tokens", "s", quantiles("inter_token")),
    ("Time to the end", "s", quantiles("request")),
    ("KV blocks", "percentunit", {
        "of answers": "sum(metal_marlin_kv_blocks_used) / sum(metal_marlin_kv_blocks)",
        "kept for later": "sum(metal_marlin_kv_blocks_cached) / sum(metal_marlin_kv_blocks)",
    }),
    ("Prefix cache and guesses: share that was right", "percentunit", {
        "prompt tokens found": rate("prefix_cache_hits") + " / " + rate("prefix_cache_queries"),
        "guesses right": rate("accepted_tokens") + " / " + rate("drafted_tokens"),
    }),
    ("Answers by their end, and those that gave way, a second", "short", {
        "{{reason}}": "sum by (reason) (rate(metal_marlin_answers_total[$__rate_interval]))", "gave way": rate("preemptions"),
    }),
    ("Answers by model", "short", {"{{model}}": "sum by (model) (metal_marlin_requests_running)"}),
    ("Models that are loaded", "short", {"loaded": "sum(metal_marlin_models_loaded)"}),
    ("Models that come and go, a minute", "short", {
        "{{model}}, {{result}}": "60 * sum by (model, result) (rate(metal_marlin_model_loads_total[$__rate_interval]))",
        "{{model}}, unloaded: {{reason}}": "60 * sum by (model, reason) (rate(metal_marlin_model_unloads_total[$__rate_interval]))",
    }),
]


def panel(number, title, unit, queries):
    targets = [
        {"refId": chr(ord("A") + place), "datasource": SOURCE, "expr": expression, "legendFormat": legend}
        for place, (legend, expression) in enumerate(queries.items())
    ]
    return {
        "id": number + 1, "type": "timeseries", "title": title, "datasource": SOURCE, "targets": targets,
        "gridPos": {"x": number % 3 * WIDTH, "y": number // 3 * HEIGHT, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
    }


dashboard = {
    "title": "Metal Marlin", "uid": "metal-marlin", "tags": ["metal-marlin"], "schemaVersion": 39, "editable": True, "refresh": "10s",
    "time": {"from": "now-1h", "to": "now"},
    "templating": {"list": [{"name": "source", "label": "Data source", "type": "datasource", "query": "prometheus"}]},
    "panels": [panel(number, *of) for number, of in enumerate(PANELS)],
}
Path(__file__).with_name("metal-marlin.json").write_text(json.dumps(dashboard, indent=2) + "\n")
