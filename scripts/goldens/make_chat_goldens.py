#!/usr/bin/env python3
"""Renders conversations with `transformers`, for the tests of marlin-engine's chat templates.

    pip install -r scripts/goldens/requirements.txt
    python scripts/goldens/make_chat_goldens.py

The templates are the *.jinja files of `crates/marlin-engine/tests/chat_templates`; they were written for these tests,
in the ways that published ones are. Each is rendered with every conversation below. The result, goldens.json beside
them, is a list of {template, messages, tools, variables, add_generation_prompt, rendered}, or `refused` for what
raise_exception says instead of `rendered`.
"""

import json
from pathlib import Path

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

FOLDER = Path(__file__).resolve().parents[2] / "crates" / "marlin-engine" / "tests" / "chat_templates"
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather at a place: \"now\" & <soon>, in °C.",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string"},
                "unit": {"type": "string", "enum": ["celsius", "kelvin"]},
                "at": {"type": "object", "properties": {"hour": {"type": "integer", "minimum": 0}}},
            },
            "required": ["place"],
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}


def say(role, content, **fields):
    return {"role": role, "content": content, **fields}


def call(name, arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


QUESTION = [say("user", "  How many o's are in \"foo's zoo\"?\n")]
TALK = [
    say("system", "Answer briefly.\n"),
    say("user", "Hello <there> & good day"),
    say("assistant", " Grüß Gott! 你好 🦀 "),
    say("user", "Why is the sky\n\n    blue?"),
]
THOUGHTS = [
    say("user", "1 + 1?"),
    say("assistant", "<think>\nEasy.\n</think>\n\nTwo."),
    say("user", "And once more?"),
    say("assistant", "Three.", reasoning_content="Two and one.\n"),
]
CALLS = [
    say("system", "Use tools."),
    say("user", "Weather in Zürich?"),
    say("assistant", "", tool_calls=[call("weather", {"place": "Zürich", "at": {"hour": 7}, "exact": 1.0})]),
    say("tool", '{"degrees": 3.5}'),
    say("tool", "dry"),
    say("assistant", "Cold & dry."),
    say("user", "Thanks"),
]
TWO_CALLS = CALLS[:2] + [say("assistant", "Wait.", tool_calls=[call("clock", "{}"), call("weather", {})])]

CONVERSATIONS = [
    dict(messages=QUESTION),
    dict(messages=QUESTION, add_generation_prompt=False),
    dict(messages=TALK),
    dict(messages=TALK[:3], add_generation_prompt=False),
    dict(messages=TALK[1:], variables={"today": "2 May 2024"}),
    dict(messages=THOUGHTS[:3], variables={"enable_thinking": False}),
    dict(messages=THOUGHTS[:3], variables={"enable_thinking": True}),
    dict(messages=THOUGHTS, add_generation_prompt=False),
    dict(messages=TALK, tools=[WEATHER, CLOCK]),
    dict(messages=CALLS, tools=[WEATHER, CLOCK]),
    dict(messages=CALLS),
    dict(messages=TWO_CALLS, tools=[CLOCK]),
    dict(
        messages=TALK,
        variables={"number": 12345678901, "nested": {"b": [1, "ä\t\"q\"", None, [], {}], "a": {"x": False, "π": 0.1}}},
    ),
]


def render(template, conversation):
    """One golden."""
    conversation = {"tools": [], "variables": {}, "add_generation_prompt": True, **conversation}
    golden = {"template": template.name, **conversation}
    try:
        [rendered], _ = render_jinja_template(
            [conversation["messages"]],
            tools=conversation["tools"] or None,
            chat_template=template.read_text(),
            add_generation_prompt=conversation["add_generation_prompt"],
            **SPECIAL_TOKENS,
            **conversation["variables"],
        )
        return {**golden, "rendered": rendered}
    except jinja2.exceptions.TemplateError as error:
        return {**golden, "refused": error.message}


def main():
    templates = sorted(FOLDER.glob("*.jinja"))
    goldens = [render(template, conversation) for template in templates for conversation in CONVERSATIONS]
    text = json.dumps({"special_tokens": SPECIAL_TOKENS, "goldens": goldens}, ensure_ascii=False, indent=1)
    (FOLDER / "goldens.json").write_text(text + "\n")
    refused = sum("refused" in golden for golden in goldens)
    print(f"{len(goldens)} goldens of {len(templates)} templates, {refused} refused")


if __name__ == "__main__":
    main()
