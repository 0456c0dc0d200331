"""Tools of daily life: weather, calendar, clock."""

from __future__ import annotations

from agentft.data.synthetic.tools import Parameter, Tool, Wording

_CITY = Parameter("city", "city", "city location town place city_name", "city name", "城市")
_DATE = Parameter("date", "date", "date day on_date", "date", "日期")
_TIME = Parameter("time", "time", "time start_time at_time clock_time", "time", "时间")

WEATHER = (
    Tool(
        "weather_now",
        "weather",
        ("get weather now", "current weather", "weather now", "check weather today"),
        (_CITY, Parameter("unit", "temperature_unit", "unit units degree_unit", "temperature unit", "温度单位", False)),
        {"temperature": "degrees", "sky": "sky"},
        Wording(
            ("Current weather in a city", "Weather in a city right now"),
            "check the current weather",
            (
                "What is the weather like [in {city} ]right now?[ Use {unit}.]",
                "How is the weather in {city} at the moment?[ Please give it in {unit}.]",
                "Tell me the current weather[ in {city}][, in {unit}].",
                "Is it warm[ in {city}] now?[ I prefer {unit}.]",
            ),
            (
                "It is {sky} in {city} with {temperature} degrees.",
                "The weather in {city} is {sky}, {temperature} degrees.",
                "Right now {city} has {temperature} degrees and it is {sky}.",
            ),
            (
                "What is the weather in {city} and {city2} right now?",
                "Compare the current weather of {city} and {city2}.",
            ),
        ),
        Wording(
            ("查询城市当前天气", "实时天气"),
            "查询当前天气",
            (
                "[{city}]现在天气怎么样？[用{unit}表示。]",
                "查一下[{city}]此刻的天气[，用{unit}]。",
                "现在[{city}]外面冷不冷？[温度用{unit}。]",
            ),
            ("{city}现在{sky}，{temperature}度。", "{city}目前天气{sky}，气温{temperature}度。"),
            ("{city}和{city2}现在天气怎么样？", "比较一下{city}和{city2}的实时天气。"),
        ),
        again="city",
    ),
    Tool(
        "weather_forecast",
        "weather",
        ("get weather forecast", "forecast weather", "weather forecast", "daily forecast"),
        (_CITY, _DATE),
        {"high": "degrees", "sky": "sky"},
        Wording(
            ("Weather forecast for a date", "Forecast for a city and day"),
            "get the weather forecast",
            (
                "What will the weather be in {city}[ on {date}]?",
                "Give me the forecast for {city}[ on {date}].",
                "I travel to {city}[ on {date}]. What weather should I expect?",
            ),
            (
                "{city} will be {sky} on {date}, with up to {high} degrees.",
                "On {date} it will be {sky} in {city}, at most {high} degrees.",
            ),
            ("What will the weather be on {date} in {city} and in {city2}?",),
        ),
        Wording(
            ("查询城市某天的天气预报", "天气预报"),
            "查询天气预报",
            (
                "{city}[{date}]会是什么天气？",
                "帮我看看{city}[{date}]的天气预报。",
                "我[{date}]要去{city}，那天天气如何？",
            ),
            ("{city}{date}{sky}，最高{high}度。", "预计{date}{city}{sky}，最高气温{high}度。"),
            ("{date}{city}和{city2}的天气预报分别是什么？",),
        ),
        again="city",
    ),
    Tool(
        "air_quality",
        "weather",
        ("get air quality", "air quality index", "check air", "air pollution"),
        (_CITY,),
        {"index": "index", "level": "air_level"},
        Wording(
            ("Air quality in a city", "Air pollution of a city"),
            "check the air quality",
            (
                "How is the air quality[ in {city}]?",
                "Is the air clean[ in {city}] today?",
                "Air pollution level[ in {city}], please.",
            ),
            (
                "The air quality in {city} is {level}, index {index}.",
                "{city} has an air quality index of {index}, which is {level}.",
            ),
            ("Compare the air quality of {city} and {city2}.", "How clean is the air in {city} and {city2}?"),
        ),
        Wording(
            ("查询城市空气质量", "空气污染指数"),
            "查询空气质量",
            ("[{city}]空气质量怎么样？", "今天[{city}]的空气好吗？", "查[{city}]的空气污染指数。"),
            ("{city}空气质量{level}，指数{index}。", "{city}的空气质量指数是{index}，{level}。"),
            ("{city}和{city2}的空气质量各是多少？",),
        ),
        again="city",
    ),
)

CALENDAR = (
    Tool(
        "event_create",
        "calendar",
        ("create event", "add calendar event", "schedule event", "new appointment"),
        (
            Parameter("event", "event", "title event_title name subject", "event title", "事项"),
            _DATE,
            _TIME,
            Parameter(
                "minutes", "minutes", "minutes duration length_minutes", "length in minutes", "时长（分钟）", False
            ),
        ),
        {"event_id": "event_id"},
        Wording(
            ("Add an event to the calendar", "Create a calendar entry"),
            "add the event",
            (
                "Put {event} in my calendar on {date}[ at {time}][ for {minutes} minutes].",
                "Schedule {event}[ on {date}] at {time}.[ It takes {minutes} minutes.]",
                "Please add {event} to my calendar, {date}[ at {time}][, {minutes} minutes long].",
            ),
            (
                "{event} is in your calendar on {date} at {time}, number {event_id}.",
                "Added {event} on {date} at {time} ({event_id}).",
            ),
        ),
        Wording(
            ("在日历中添加日程", "新建日程"),
            "添加日程",
            (
                "把{event}加到日历，{date}[ {time}][，{minutes}分钟]。",
                "帮我安排{event}，时间是{date}[ {time}][，持续{minutes}分钟]。",
            ),
            ("已添加{date} {time}的{event}，编号{event_id}。", "{event}已排在{date} {time}，编号{event_id}。"),
        ),
    ),
    Tool(
        "event_list",
        "calendar",
        ("list events", "show calendar", "get agenda", "day schedule"),
        (_DATE,),
        {"events": "event*2"},
        Wording(
            ("Events of a day", "List the calendar of a date"),
            "read your calendar",
            (
                "What is in my calendar[ on {date}]?",
                "Show my appointments[ for {date}].",
                "Do I have anything planned[ on {date}]?",
            ),
            ("On {date} you have {events}.", "Your calendar for {date}: {events}."),
            ("What do I have planned on {date} and on {date2}?",),
        ),
        Wording(
            ("查看某天的日程", "列出日程"),
            "查看日程",
            ("我[{date}]有什么安排？", "看一下[{date}]的日程。", "[{date}]我忙不忙？"),
            ("{date}您有：{events}。", "{date}的安排是{events}。"),
            ("{date}和{date2}我有什么安排？",),
        ),
        again="date",
    ),
    Tool(
        "event_find",
        "calendar",
        ("find event", "search events", "lookup appointment", "event search"),
        (Parameter("event", "event", "query title keyword event_name", "event title", "事项"),),
        {"event_id": "event_id", "date": "date"},
        Wording(
            ("Find an event by title", "Search the calendar by title"),
            "find the event",
            ("When is my {event}?", "Find the entry for {event} in my calendar.", "Which day is {event} on?"),
            ("{event} is on {date}, number {event_id}.", "I found {event} on {date} ({event_id})."),
        ),
        Wording(
            ("按名称查找日程", "搜索日程"),
            "查找日程",
            ("{event}是哪天？", "在日历里找一下{event}。"),
            ("{event}在{date}，编号{event_id}。", "找到了：{event}，{date}，编号{event_id}。"),
        ),
        again="event",
    ),
    Tool(
        "event_cancel",
        "calendar",
        ("cancel event", "delete event", "remove appointment", "drop event"),
        (Parameter("event_id", "event_id", "event_id id event_number", "event number", "日程编号"),),
        {"events_left": "count"},
        Wording(
            ("Cancel an event by number", "Delete a calendar entry"),
            "cancel the event",
            (
                "Cancel event {event_id}.",
                "Please remove {event_id} from my calendar.",
                "Event {event_id} is off, delete it.",
            ),
            (
                "Event {event_id} is cancelled, {events_left} events are left.",
                "I cancelled {event_id}. You have {events_left} events left.",
            ),
            ("Cancel the events {event_id} and {event_id2}.",),
        ),
        Wording(
            ("按编号取消日程", "删除日程"),
            "取消日程",
            ("取消日程{event_id}。", "请把{event_id}从日历里删掉。"),
            ("日程{event_id}已取消，还剩{events_left}项。", "已取消{event_id}，剩余{events_left}项日程。"),
        ),
        again="event_id",
    ),
)

CLOCK = (
    Tool(
        "alarm_set",
        "clock",
        ("set alarm", "create alarm", "alarm set", "wake up alarm"),
        (_TIME, Parameter("label", "task", "label title note", "label", "标签", False)),
        {"alarm": "count"},
        Wording(
            ("Set an alarm", "Alarm at a clock time"),
            "set the alarm",
            (
                "Set an alarm[ for {time}][ with the label {label}].",
                "I need an alarm[ at {time}][, labelled {label}].",
                "Ring an alarm[ at {time}][ and call it {label}].",
            ),
            ("Alarm {alarm} will ring at {time}.", "Done, alarm {alarm} is set for {time}."),
        ),
        Wording(
            ("设置闹钟", "新建闹钟"),
            "设置闹钟",
            ("定一个[{time}的]闹钟[，标签是{label}]。", "帮我设个闹钟[，{time}][，备注{label}]。"),
            ("{alarm}号闹钟已设在{time}。", "好的，{time}响铃，闹钟编号{alarm}。"),
        ),
        again="time",
    ),
    Tool(
        "timer_start",
        "clock",
        ("start timer", "set timer", "countdown", "run timer"),
        (Parameter("minutes", "minutes", "minutes duration_minutes length", "minutes", "分钟数"),),
        {"ends": "time"},
        Wording(
            ("Start a countdown timer", "Timer for some minutes"),
            "start the timer",
            (
                "Start a timer[ for {minutes} minutes].",
                "Set a countdown[ of {minutes} minutes].",
                "Time me[ for {minutes} minutes], please.",
            ),
            ("Your timer of {minutes} minutes ends at {ends}.", "The timer runs for {minutes} minutes, until {ends}."),
        ),
        Wording(
            ("开始倒计时", "计时器"),
            "开始计时",
            ("倒计时{minutes}分钟。", "开一个{minutes}分钟的计时器。", "帮我计时{minutes}分钟。"),
            ("{minutes}分钟倒计时将在{ends}结束。", "计时开始，{minutes}分钟后即{ends}结束。"),
        ),
    ),
    Tool(
        "reminder_add",
        "clock",
        ("add reminder", "create reminder", "remind me", "set reminder"),
        (Parameter("task", "task", "task text what reminder_text", "what to remind of", "提醒内容"), _DATE),
        {"reminder": "count"},
        Wording(
            ("Add a reminder for a date", "Remind the user of a task"),
            "add the reminder",
            (
                "Remind me to {task}[ on {date}].",
                "Set a reminder to {task}[ on {date}].",
                "I must not forget to {task}[ on {date}]. Remind me.",
            ),
            (
                "I will remind you to {task} on {date}, reminder {reminder}.",
                "Reminder {reminder} is set: {task} on {date}.",
            ),
        ),
        Wording(
            ("添加提醒", "新建提醒"),
            "添加提醒",
            ("[{date}]提醒我{task}。", "帮我加个提醒：[{date}]{task}。"),
            ("好的，{date}会提醒您{task}，编号{reminder}。", "{reminder}号提醒已添加：{date}{task}。"),
        ),
    ),
    Tool(
        "world_time",
        "clock",
        ("world time", "local time", "get time in city", "city clock"),
        (_CITY,),
        {"local_time": "time"},
        Wording(
            ("Local time in a city", "Current time of a city"),
            "look up the local time",
            ("What time is it[ in {city}]?", "Tell me the local time[ in {city}].", "How late is it now[ in {city}]?"),
            ("It is {local_time} in {city}.", "The local time in {city} is {local_time}."),
            ("What time is it in {city} and in {city2}?",),
        ),
        Wording(
            ("查询城市当地时间", "世界时钟"),
            "查询当地时间",
            ("[{city}]现在几点？", "查一下[{city}]的当地时间。"),
            ("{city}现在是{local_time}。", "{city}当地时间{local_time}。"),
            ("{city}和{city2}现在各是几点？",),
        ),
        again="city",
    ),
)

DAILY = (*WEATHER, *CALENDAR, *CLOCK)
