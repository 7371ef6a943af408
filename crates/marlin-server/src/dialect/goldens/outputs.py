"""Writes outputs.json: what models of each dialect say, and what of it is content, reasoning and calls.

The forms are those that the chat templates of the models teach and that the test suites of vLLM (tests/tool_use,
tests/entrypoints/openai/tool_parsers) and llama.cpp (tests/test-chat.cpp) have recorded of them.
"""

import json
import pathlib

WEATHER = {
    "name": "get_weather",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "zip": {"type": "string"},
            "options": {"type": "object"},
            "exact": {"type": "boolean"},
        },
    },
}
NOW = {"name": "now"}
TOOLS = [WEATHER, NOW]

cases = []


def case(dialect, name, text, content=None, reasoning=None, calls=(), **more):
    calls = [{"name": called, "arguments": arguments} for called, arguments in calls]
    cases.append({"dialect": dialect, "name": name, "text": text, "content": content, "reasoning": reasoning, "calls": calls, **more})


# Hermes, Qwen 2.5, Qwen 3
case("hermes", "text", "Hello, world!", "Hello, world!")
case("hermes", "text that ends in white space", "One\nTwo\n", "One\nTwo\n")
case("hermes", "one call", '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>', None, None,
     [("get_weather", '{"city": "Paris"}')])
case("hermes", "text before a call", 'I will look.\n\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>', "I will look.", None,
     [("now", "{}")])
case("hermes", "two calls",
     '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
     '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo", "days": 2}}\n</tool_call>', None, None,
     [("get_weather", '{"city": "Paris"}'), ("get_weather", '{"city": "Oslo", "days": 2}')])
case("hermes", "reasoning, then a call",
     '<think>\nThe user asks for Łódź.\n</think>\n\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Łódź 🌧"}}\n</tool_call>', None,
     "The user asks for Łódź.", [("get_weather", '{"city": "Łódź 🌧"}')])
case("hermes", "reasoning that the template began", "Let me see.\n</think>\n\nIt rains.", "It rains.", "Let me see.",
     prompt_ends="<|im_start|>assistant\n<think>\n")
case("hermes", "no reasoning, because the template ended it", "It rains.", "It rains.",
     prompt_ends="<|im_start|>assistant\n<think>\n\n</think>\n\n")
case("hermes", "strings that look like markup",
     '<tool_call>\n{"name": "get_weather", "arguments": {"city": "a } \\" </tool_call> {", "options": {"x": ["]", {}]}}}\n</tool_call>', None,
     None, [("get_weather", '{"city": "a } \\" </tool_call> {", "options": {"x": ["]", {}]}}')])
case("hermes", "arguments before the name", '<tool_call>{"arguments": {"city": "name"}, "name": "get_weather"}</tool_call>', None, None,
     [("get_weather", '{"city": "name"}')])
case("hermes", "arguments within a text", '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"Rome\\"}"}</tool_call>', None, None,
     [("get_weather", '{"city": "Rome"}')])
case("hermes", "without the closing marker", '<tool_call>\n{"name": "now", "arguments": {}}\n', None, None, [("now", "{}")])
case("hermes", "a marker in prose", "Write `<tool_call>` before each call.", "Write `<tool_call>` before each call.")
case("hermes", "no JSON between the markers", "<tool_call>\nnow\n</tool_call>", "<tool_call>\nnow\n</tool_call>")
case("hermes", "cut off within the arguments", '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Pa', None, None,
     [("get_weather", '{"city": "Pa')])
case("hermes", "no tools were given", '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
     '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>', tools=False)
case("hermes", "one call only", '<tool_call>{"name": "now", "arguments": {}}</tool_call><tool_call>{"name": "now", "arguments": {}}</tool_call>',
     None, None, [("now", "{}")], parallel=False)
case("hermes", "a comparison", "if a < b and c <= d: print('<t>')", "if a < b and c <= d: print('<t>')")

# Qwen 3 Coder
case("qwen-xml", "one call", "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>", None, None,
     [("get_weather", '{"city":"Paris"}')])
case("qwen-xml", "types",
     "Sure!<tool_call>\n<function=get_weather>\n<parameter=city>\nNew\nYork\n</parameter>\n<parameter=days>\n3\n</parameter>\n<parameter=zip>\n10001\n"
     '</parameter>\n<parameter=options>\n{"unit": "F"}\n</parameter>\n<parameter=exact>\ntrue\n</parameter>\n</function>\n</tool_call>', "Sure!",
     None, [("get_weather", '{"city":"New\\nYork","days":3,"zip":"10001","options":{"unit":"F"},"exact":true}')])
case("qwen-xml", "no arguments", "<tool_call>\n<function=now>\n</function>\n</tool_call>", None, None, [("now", "{}")])
case("qwen-xml", "two calls",
     "<tool_call>\n<function=now>\n</function>\n</tool_call>\n<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo ☃\n</parameter>\n</function>\n"
     "</tool_call>", None, None, [("now", "{}"), ("get_weather", '{"city":"Oslo ☃"}')])
case("qwen-xml", "cut off within the arguments", "<tool_call>\n<function=get_weather>\n<parameter=days>\n3\n</parameter>\n<parameter=city>\nPa", None,
     None, [("get_weather", '{"days":3')])
case("qwen-xml", "cut off within the name", "<tool_call>\n<function=get_wea", None)
case("qwen-xml", "text", "x = f'<function>{y}'", "x = f'<function>{y}'")
case("qwen-xml", "no function between the markers", "<tool_call>\nhello</tool_call> there", "<tool_call>\nhello</tool_call> there")

# GLM 4.5 and later
case("glm4", "one call", "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n</tool_call>", None, None,
     [("get_weather", '{"city":"Paris"}')])
case("glm4", "without line ends, as GLM 4.7", "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Paris</arg_value><arg_key>days</arg_key>"
     "<arg_value>2</arg_value></tool_call>", None, None, [("get_weather", '{"city":"Paris","days":2}')])
case("glm4", "types", "<tool_call>get_weather\n<arg_key>zip</arg_key>\n<arg_value>10001</arg_value>\n<arg_key>options</arg_key>\n"
     '<arg_value>{"unit": "C"}</arg_value>\n<arg_key>exact</arg_key>\n<arg_value>false</arg_value>\n</tool_call>', None, None,
     [("get_weather", '{"zip":"10001","options":{"unit":"C"},"exact":false}')])
case("glm4", "no arguments", "<tool_call>now\n</tool_call>", None, None, [("now", "{}")])
case("glm4", "reasoning, text, two calls",
     "<think>Both.</think>\n\nI will look.\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>北京</arg_value>\n</tool_call>\n"
     "<tool_call>now\n</tool_call>", "I will look.", "Both.", [("get_weather", '{"city":"北京"}'), ("now", "{}")])
case("glm4", "cut off within the arguments", "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n<arg_key>da", None, None,
     [("get_weather", '{"city":"Oslo"')])
case("glm4", "cut off within the name", "<tool_call>get_wea", None)
case("glm4", "broken arguments", "<tool_call>now\n<arg_key>x\n<arg_value>1</arg_value>\n</tool_call>",
     "<tool_call>now\n<arg_key>x\n<arg_value>1</arg_value>\n</tool_call>")
case("glm4", "a marker in prose", "The tag <tool_call> (see below) begins a call.", "The tag <tool_call> (see below) begins a call.")

# Llama 3
case("llama3", "text", "It is 5 o'clock.", "It is 5 o'clock.")
case("llama3", "an object alone", '{"name": "get_weather", "parameters": {"city": "Paris"}}', None, None, [("get_weather", '{"city": "Paris"}')])
case("llama3", "with a marker", '<|python_tag|>{"name": "now", "parameters": {}}', None, None, [("now", "{}")])
case("llama3", "several", '{"name": "now", "parameters": {}}; {"name": "get_weather", "parameters": {"city": "test {value} [x]"}} ; '
     '{"name": "now", "arguments": {}}', None, None,
     [("now", "{}"), ("get_weather", '{"city": "test {value} [x]"}'), ("now", "{}")])
case("llama3", "an object that is no call", '{"answer": {"a": [1, 2]}}', '{"answer": {"a": [1, 2]}}')
case("llama3", "a tool that there is not", '{"name": "rm", "parameters": {}}', '{"name": "rm", "parameters": {}}')
case("llama3", "an object behind text", 'Call {"name": "now", "parameters": {}}', 'Call {"name": "now", "parameters": {}}')
case("llama3", "no tools were given", '{"name": "now", "parameters": {}}', '{"name": "now", "parameters": {}}', tools=False)

# Mistral
case("mistral", "a list", '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris"}}]', None, None, [("get_weather", '{"city": "Paris"}')])
case("mistral", "a list of two, with spaces", '[TOOL_CALLS]  [ {"name":"now" , "arguments" : {} }, {"arguments": {"city": "name"}, "name": "get_weather"} ]',
     None, None, [("now", "{}"), ("get_weather", '{"city": "name"}')])
case("mistral", "a name and arguments", '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}', None, None, [("get_weather", '{"city": "Paris"}')])
case("mistral", "a name and arguments without a marker", '[TOOL_CALLS]get_weather{"city": "Paris"}', None, None, [("get_weather", '{"city": "Paris"}')])
case("mistral", "with an id, twice", '[TOOL_CALLS]now[CALL_ID]abc123def[ARGS]{}[TOOL_CALLS]get_weather[ARGS]{"days": 2}', None, None,
     [("now", "{}"), ("get_weather", '{"days": 2}')])
case("mistral", "a list that is cut off", '[TOOL_CALLS][{"name": "now", "arguments": {}}, {"name": "get_weather", "arguments": {"city": "Pa', None, None,
     [("now", "{}"), ("get_weather", '{"city": "Pa')])
case("mistral", "cut off within the arguments", '[TOOL_CALLS]get_weather[ARGS]{"city": "Pa', None, None, [("get_weather", '{"city": "Pa')])
case("mistral", "a list without end", '[TOOL_CALLS][{"name": "now", "arguments": {}}', None, None, [("now", "{}")])
case("mistral", "text before", 'Let me see.[TOOL_CALLS]now[ARGS]{}', "Let me see.", None, [("now", "{}")])
case("mistral", "reasoning", "[THINK]Hmm.[/THINK]It rains.", "It rains.", "Hmm.")
case("mistral", "a list that is no list of calls", "[TOOL_CALLS][1, 2]", "[TOOL_CALLS][1, 2]")
case("mistral", "brackets", "a[0] = [TOOL] and [T", "a[0] = [TOOL] and [T")

# gpt-oss
case("harmony", "final", "<|channel|>final<|message|>It is 5 o'clock.", "It is 5 o'clock.")
case("harmony", "reasoning, then final",
     "<|channel|>analysis<|message|>The user asks.<|end|><|start|>assistant<|channel|>final<|message|>It rains. ☔", "It rains. ☔", "The user asks.")
case("harmony", "reasoning, then a call",
     "<|channel|>analysis<|message|>Look it up.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
     '{"city": "Paris"}', None, "Look it up.", [("get_weather", '{"city": "Paris"}')])
case("harmony", "the function in the role",
     '<|channel|>analysis<|message|>Now.<|end|><|start|>assistant to=functions.now<|channel|>commentary json<|message|>{}', None, "Now.",
     [("now", "{}")])
case("harmony", "a preamble, then a call",
     "<|channel|>commentary<|message|>I will look.<|end|><|start|>assistant<|channel|>commentary to=functions.now<|message|>{}<|call|>",
     "I will look.", None, [("now", "{}")])
case("harmony", "a preamble, then final", "<|channel|>commentary<|message|>One moment.<|end|><|start|>assistant<|channel|>final<|message|>Done.",
     "One moment.\n\nDone.")
case("harmony", "cut off within a header", "<|channel|>analysis<|message|>Hm.<|end|><|start|>assi", None, "Hm.")
case("harmony", "text without channels", "It is 5 o'clock.", "It is 5 o'clock.")

# Models without calls
case("plain", "text", "A <tool_call> is text.", "A <tool_call> is text.")
case("plain", "reasoning", "<think>a</think>b", "b", "a")
case("plain", "reasoning that does not end", "<think>a b", None, "a b")
case("plain", "a marker in prose", "Say <think> first.", "Say <think> first.")

out = {"tools": TOOLS, "cases": cases}
path = pathlib.Path(__file__).with_name("outputs.json")
path.write_text(json.dumps(out, indent=1, ensure_ascii=False) + "\n")
