"""What people and assistants say whatever the tool: greetings, refusals, questions back, corrections, small talk."""

from __future__ import annotations

from dataclasses import dataclass

from agentft.data.synthetic.tools import Language


@dataclass(frozen=True, slots=True)
class Phrasebook:
    """The phrases of one language. Slots are filled by `dialogues.py`."""

    instructions: tuple[str, ...]
    at_once: str
    """Added to the instruction where several calls stand in one turn without waiting for results."""
    plugins: str
    greetings: tuple[str, ...]
    announcements: tuple[str, ...]
    joints: tuple[str, ...]
    """Between two requests in one turn."""
    between_summaries: str
    list_joint: str
    name_joint: str
    again: tuple[str, ...]
    questions: tuple[str, ...]
    replies: tuple[str, ...]
    corrections: tuple[str, ...]
    refusals: tuple[str, ...]
    failures: tuple[str, ...]
    errors: tuple[str, ...]
    not_found: str
    unknown: str
    thanks: tuple[tuple[str, str], ...]
    abilities: tuple[tuple[str, str], ...]
    small_talk: tuple[tuple[str, str], ...]


_EN = Phrasebook(
    instructions=(
        "To use a plugin, write JSON with api_name and parameters between <|startofthink|> and <|endofthink|>, then"
        " reply from its result; else reply directly.",
        "Decide whether a plugin is needed. Its call is JSON with api_name and parameters between <|startofthink|> and"
        " <|endofthink|>. If none is, reply directly.",
        "You can call plugins: JSON with api_name and parameters between <|startofthink|> and <|endofthink|>. Sum up"
        " the result. Without need, reply directly.",
    ),
    at_once=" Give several calls at once.",
    plugins=" Plugins:",
    greetings=(
        "Hi! ",
        "Hello, {person} here. ",
        "Good morning. ",
        "Hello! ",
        "Hi, this is {person}. ",
        "I am in {city} today. ",
        "A question. ",
    ),
    announcements=("Let me {goal}.", "I will {goal} for you."),
    joints=(" Also: ", " And one more thing: ", " Second: ", " Another thing: "),
    between_summaries=" ",
    list_joint=" and ",
    name_joint=", ",
    again=("What about {value}?", "And {value}?", "The same for {value}, please.", "Now do it for {value}."),
    questions=("Could you tell me the {what}?", "Please tell me the {what}."),
    replies=("{value}", "{value}, please.", "It is {value}.", "Take {value}."),
    corrections=("Sorry, I meant {value}.", "My mistake, it should be {value}.", "Please try {value} instead."),
    refusals=(
        "Sorry, none of the plugins here can {goal}.",
        "I am sorry, I have no plugin to {goal}.",
    ),
    failures=("Sorry, I could not {goal}: {error}.", "I was not able to {goal}: {error}."),
    errors=(
        "service unavailable",
        "request timed out",
        "daily limit reached",
        "connection lost",
        "access denied",
        "internal error",
        "system under maintenance",
    ),
    not_found="{what} {value} not found",
    unknown="unknown {what} {value}",
    thanks=(
        ("Thank you!", "You are welcome!"),
        ("Thanks, that is all.", "You are welcome! Have a nice day."),
        ("Great, thanks a lot.", "You are welcome!"),
        ("Perfect. Goodbye!", "Goodbye! Have a nice day."),
    ),
    abilities=(
        ("What can you do for me?", "I can use these plugins: {names}."),
        ("Which plugins do you have?", "I can use these plugins: {names}."),
    ),
    small_talk=(
        ("Hi, I am {person}.", "Hello {person}! How can I help you?"),
        ("Good evening, my name is {person}.", "Good evening, {person}! How can I help you?"),
        ("I just came back from {city}.", "Welcome back! I hope you had a good time in {city}."),
        ("Tomorrow I move to {city}.", "I wish you a good start in {city}!"),
        ("What is {a} plus {b}?", "{a} plus {b} is {sum}."),
        ("Which number is larger, {a} or {b}?", "{larger} is larger."),
        ("Write {title} in capital letters.", "{upper_title}"),
        ("Say this after me: {sentence}.", "{sentence}."),
        ("What is the last name of {person}?", "The last name is {surname}."),
        ("{person} passed the exam!", "Congratulations to {person}!"),
        ("I am tired after {event}.", "I am sorry to hear that. Take some rest after {event}."),
        ("My team is from {city}, I am so proud.", "That is great, you can be proud of {city}!"),
        ("Today is the birthday of {person}.", "Happy birthday to {person}!"),
    ),
)

_ZH = Phrasebook(
    instructions=(
        "请判断是否需要插件。需要时，把含api_name和parameters的JSON放在<|startofthink|>和<|endofthink|>之间，再根据结果回答；否则直接回答。",
        "你可以调用插件：用含api_name和parameters的JSON，前后加<|startofthink|>和<|endofthink|>，然后总结结果；不需要则直接回答。",
    ),
    at_once="多个调用一次给出。",
    plugins="插件：",
    greetings=("你好，", "您好！我是{person}。", "请问，", "我在{city}。", "麻烦你，"),
    announcements=("我来{goal}。", "好的，马上{goal}。"),
    joints=("另外，", "还有，"),
    between_summaries="",
    list_joint="、",
    name_joint="、",
    again=("{value}呢？", "那{value}呢？", "换成{value}呢？"),
    questions=("请告诉我{what}。", "请问{what}是什么？"),
    replies=("{value}", "{value}。", "是{value}。"),
    corrections=("说错了，是{value}。", "抱歉，应该是{value}。", "换成{value}试试。"),
    refusals=("抱歉，现有插件无法{goal}。", "抱歉，我没有可以{goal}的插件。"),
    failures=("抱歉，未能{goal}：{error}。", "{goal}失败：{error}。"),
    errors=("服务不可用", "请求超时", "今日次数已用完", "连接中断", "没有权限", "系统维护中"),
    not_found="未找到{what}{value}",
    unknown="未知{what}{value}",
    thanks=(("谢谢！", "不客气！"), ("好的，没事了。", "好的，祝您愉快！")),
    abilities=(("你能做什么？", "我可以使用这些插件：{names}。"), ("你有哪些插件？", "我可以使用这些插件：{names}。")),
    small_talk=(
        ("你好，我是{person}。", "{person}，您好！有什么可以帮您？"),
        ("我刚从{city}回来。", "欢迎回来！希望您在{city}过得愉快。"),
        ("我明天搬到{city}。", "祝您在{city}一切顺利！"),
        ("{a}加{b}等于多少？", "{a}加{b}等于{sum}。"),
        ("{a}和{b}哪个大？", "{larger}更大。"),
        ("跟我说：{sentence}。", "{sentence}。"),
        ("今天是{person}的生日。", "祝{person}生日快乐！"),
        ("{person}考试通过了！", "恭喜{person}！"),
    ),
)


def phrasebook(language: Language) -> Phrasebook:
    """The phrases of `language`."""
    return _EN if language == "en" else _ZH
