"""The system message that GLM-4's template makes of `tools`: fixed texts of the release, in Chinese.

Source: tokenization_chatglm.py of THUDM/glm-4v-9b (see tokenizer.py). The model card says that this model is not for
tools; the template has them all the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lavish.common.errors import PromptError, did_you_mean, shown

INTRODUCTION = (
    "你是一个名为 GLM-4 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型开发的，你的任务是针对用户"
    "的问题和要求提供适当的答复和支持。"
)
FUNCTION = "\n\n## {name}\n\n{definition}\n在调用上述函数时，请使用 Json 格式表示调用的参数。"
BUILT_IN = {
    "python": (
        "\n\n## python\n\n当你向 `python` 发送包含 Python 代码的消息时，该代码将会在一个有状态的 Jupyter note"
        "book 环境中执行。\n`python` 返回代码执行的输出，或在执行 60 秒后返回超时。\n"
        "`/mnt/data` 将会持久化存储你的文件。在此会话中，`python` 无法访问互联网。不要使用 `python` 进行任何"
        "网络请求或者在线 API 调用，这些在线内容的访问将不会成功。"
    ),
    "simple_browser": (
        "\n\n## simple_browser\n\n你可以使用 `simple_browser` 工具。该工具支持以下函数：\n"
        "`search(query: str, recency_days: int)`：使用搜索引擎进行查询并显示结果，可以使用 `recency_days` 参"
        "数控制搜索内容的时效性。\n`mclick(ids: list[int])`：获取一系列指定 id 的页面内容。每次调用时，须选择"
        "3-10个页面。选择多个角度的页面，同时尽可能选择可信任的信息来源。考虑到部分页面是无法加载的，你也可以"
        "多打开一些可能有用的页面而不用担心内容过多。\n`open_url(url: str)`：打开指定的 URL。\n"
        "\n使用 `【{引用 id}†{引用文本}】` 来引用内容。\n\n操作步骤：1. 使用 `search` 来获得信息列表; 2. 使用"
        " `mclick` 来获取指定 ID 页面的内容; 3. 根据获得的内容进行回复。在回复中应当引用信息来源。\n"
        " 如果用户提供了 URL，也可以用 `open_url` 直接打开页面。\n如果初次搜索结果没有找到合适的信息，也可以"
        "再次使用 `search` 进行搜索。"
    ),
    "cogview": (
        "\n\n## cogview\n\n如果用户的请求中包含了对图像的描述，你可以使用 `cogview` 来生成图像并展示给用户。"
        "你需要向 `cogview` 发送图像描述，规则：\n- 发送给 `cogview` 的消息必须使用英语。用户的中文描述必须完"
        "全翻译为英语。\n- 应当尽可能详细地描述图像生成的需求，需求描述约 100 英文单词。\n"
        "- 保持用户原始描述的意图。不要虚构内容或者没见过的人物。\n- 如无特殊说明，所在地为中国，持有中国立场"
        "并遵循中国社会主义价值观。"
    ),
}


def tools_text(tools: Any, where: str) -> str:
    """Give the text of the system message for a message's `tools`.

    Each is {"type": "function", "function": {"name", ...}}, or {"type": "python" | "simple_browser" | "cogview"}.

    Raises:
        PromptError: no list of such.
    """
    if isinstance(tools, str | bytes) or not isinstance(tools, Sequence):
        raise PromptError(f"{where}: tools is {shown(tools)} and must be a list of {{'type': ...}} dicts.")
    return INTRODUCTION + "".join(_tool_text(tool, f"{where}, tool {index}") for index, tool in enumerate(tools))


def _tool_text(tool: Any, where: str) -> str:
    kind = tool.get("type") if isinstance(tool, Mapping) else None
    if kind in BUILT_IN:
        return BUILT_IN[str(kind)]
    if kind != "function":
        known = ("function", *BUILT_IN)
        raise PromptError(
            f"{where}: the type is {shown(kind)}; known are {', '.join(known)}.{did_you_mean(str(kind), known)}"
        )
    function = tool.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise PromptError(f"{where}: a function needs {{'function': {{'name': '...'}}}}, found {shown(function)}.")
    try:
        definition = json.dumps(function, indent=4, ensure_ascii=False)
    except TypeError as error:
        raise PromptError(f"{where}: {function['name']!r} cannot be written as JSON ({error}).") from error
    return FUNCTION.format(name=function["name"], definition=definition)
