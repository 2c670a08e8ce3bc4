"""What `lavish chat` says, in English and Chinese."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

LANGUAGES = ("en", "zh")


@dataclass(frozen=True)
class Wording:
    """The texts of one language; `{name}` are filled in."""

    loading: str
    loaded: str
    hints: str
    ask_image: str
    you: str
    answer: str
    thinking: str
    image_set: str
    video_set: str
    image_none: str
    image_keeps: str
    new_image: str
    image_joins: str
    cleared: str
    saved: str
    save_exists: str
    save_failed: str
    nothing_to_save: str
    template_is: str
    template_set: str
    no_history: str
    drawn: str
    draw_failed: str
    no_image_for_boxes: str
    stopped: str
    cut: str
    again_to_leave: str
    unknown_command: str
    out_of_memory: str
    timing: str
    user_title: str
    help: str


EN = Wording(
    loading="Loading {name} ...",
    loaded="{name} loaded in {time}",
    hints="/help lists the commands, Ctrl-C stops an answer, stop leaves",
    ask_image="Image (path or URL, Enter for text only): ",
    you="You: ",
    answer="{name}: ",
    thinking="reading ...",
    image_set="image {name}, {width} x {height}",
    video_set="video {name}",
    image_none="text only, no image",
    image_keeps="The image stays as it was.",
    new_image="A model of this kind takes one image a conversation: a new conversation begins.",
    image_joins="The image joins the conversation, with the next question.",
    cleared="A new conversation.",
    saved="Conversation saved: {path}",
    save_exists="{path} exists already and is not overwritten; give another name: /save FILE",
    save_failed="{path} cannot be written: {reason}",
    nothing_to_save="Nothing was said yet.",
    template_is="Template: {name}. Known: {known}. Change it with /template NAME.",
    template_set="Template: {name}.",
    no_history="The template {name} sees the last question only.",
    drawn="Boxes drawn: {path}",
    draw_failed="The boxes cannot be drawn: {reason}",
    no_image_for_boxes="The answer holds boxes, and there is no image to draw them on.",
    stopped="stopped",
    cut="cut at {count} tokens (--max-new-tokens, --max-length)",
    again_to_leave="Ctrl-C again leaves, and so does stop.",
    unknown_command="No command {name}.{hint} /help lists them.",
    out_of_memory="Not enough memory for this question. /clear starts anew; --quantization int8 needs less.",
    timing="{seconds}, {count} tokens, {rate:.1f} tokens/s",
    user_title="User",
    help="""\
/image [PATH or URL]  another image; alone, it asks
/clear, clear         forget the conversation, ask for an image again
/save [FILE]          write the conversation: .json as messages, else Markdown
/template [NAME]      show or change the prompt format: {templates}
/help                 this list
/quit, stop           leave (Ctrl-D too)
Ctrl-C                stop the answer, keep the conversation; twice leaves
Alt-Enter             a new line in a question""",
)

ZH = Wording(
    loading="正在加载 {name} ...",
    loaded="{name} 已加载，用时 {time}",
    hints="输入 /help 查看命令，Ctrl-C 停止回答，stop 退出",
    ask_image="图片（路径或网址，直接回车为纯文字对话）：",
    you="用户：",
    answer="{name}：",
    thinking="正在阅读 ...",
    image_set="图片 {name}，{width} x {height}",
    video_set="视频 {name}",
    image_none="纯文字对话，没有图片",
    image_keeps="图片不变。",
    new_image="此类模型每段对话只能看一张图片：开始新的对话。",
    image_joins="图片已加入对话，随下一个问题发送。",
    cleared="新的对话。",
    saved="对话已保存：{path}",
    save_exists="{path} 已存在，不会覆盖；请换一个文件名：/save 文件名",
    save_failed="无法写入 {path}：{reason}",
    nothing_to_save="还没有任何对话。",
    template_is="提示词模板：{name}。可选：{known}。用 /template 名称 切换。",
    template_set="提示词模板：{name}。",
    no_history="模板 {name} 只看最后一个问题。",
    drawn="检测框已画好：{path}",
    draw_failed="无法画出检测框：{reason}",
    no_image_for_boxes="回答中有检测框，但没有图片可画。",
    stopped="已停止",
    cut="已达到 {count} 个 token 的上限（--max-new-tokens、--max-length）",
    again_to_leave="再按一次 Ctrl-C 退出，也可以输入 stop。",
    unknown_command="没有命令 {name}。{hint} 输入 /help 查看命令。",
    out_of_memory="内存不足，无法回答这个问题。/clear 重新开始；--quantization int8 占用更少。",
    timing="{seconds}，{count} 个 token，{rate:.1f} token/s",
    user_title="用户",
    help="""\
/image [路径或网址]   另一张图片；不带参数则询问
/clear, clear         清空对话，重新询问图片
/save [文件]          保存对话：.json 保存为消息格式，其他为 Markdown
/template [名称]      查看或切换提示词模板：{templates}
/help                 显示本列表
/quit, stop           退出（Ctrl-D 亦可）
Ctrl-C                停止回答，保留对话；连按两次退出
Alt-Enter             在问题中换行""",
)

WORDINGS = {"en": EN, "zh": ZH}


def choose_language(asked: str | None, environment: Mapping[str, str] = os.environ) -> str:
    """Give "en" or "zh": what was asked for, else what the locale says."""
    if asked is not None:
        return asked
    locale = next((environment[name] for name in ("LC_ALL", "LC_MESSAGES", "LANG") if environment.get(name)), "")
    return "zh" if locale.lower().startswith("zh") else "en"
