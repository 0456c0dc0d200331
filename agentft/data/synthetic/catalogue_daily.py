"""Tools of daily life: weather, calendar, clock, home, notes, food, media, health."""

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
            ("我的{event}是哪天？", "在日历里找一下{event}。"),
            ("{event}在{date}，编号{event_id}。", "找到了：{event}，{date}，编号{event_id}。"),
        ),
        again="event",
    ),
    Tool(
        "event_cancel",
        "calendar",
        ("cancel event", "delete event", "remove appointment", "drop event"),
        (Parameter("event_id", "event_id", "event_id id event_number", "event number", "日程编号"),),
        {"cancelled": "event"},
        Wording(
            ("Cancel an event by number", "Delete a calendar entry"),
            "cancel the event",
            (
                "Cancel event {event_id}.",
                "Please remove {event_id} from my calendar.",
                "Event {event_id} is off, delete it.",
            ),
            ("Event {event_id}, {cancelled}, is cancelled.", "I cancelled {cancelled} ({event_id})."),
            ("Cancel the events {event_id} and {event_id2}.",),
        ),
        Wording(
            ("按编号取消日程", "删除日程"),
            "取消日程",
            ("取消日程{event_id}。", "请把{event_id}从日历里删掉。"),
            ("日程{event_id}（{cancelled}）已取消。", "已取消{cancelled}，编号{event_id}。"),
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
            ("I will remind you to {task} on {date}.", "Reminder {reminder} is set: {task} on {date}."),
        ),
        Wording(
            ("添加提醒", "新建提醒"),
            "添加提醒",
            ("[{date}]提醒我{task}。", "帮我加个提醒：[{date}]{task}。"),
            ("好的，{date}会提醒您{task}。", "{reminder}号提醒已添加：{date}{task}。"),
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

_ROOM = Parameter("room", "room", "room room_name area where", "room", "房间")

HOME = (
    Tool(
        "light_switch",
        "home",
        ("switch light", "light power", "toggle light", "set light"),
        (_ROOM, Parameter("on", "on_off", "on power turn_on is_on", "true for on, false for off", "是否打开")),
        {"watts": "count"},
        Wording(
            ("Switch a light on or off", "Light on or off in a room"),
            "switch the light",
            (
                "Turn {on} the light[ in the {room}].",
                "Switch the light {on}[ in the {room}], please.",
                "Lights {on}[ in the {room}].",
            ),
            ("The light in the {room} is now {on}.", "Done, the {room} light is {on}."),
            ("Turn {on} the light in the {room} and in the {room2}.",),
        ),
        Wording(
            ("开关房间的灯", "灯光开关"),
            "控制灯光",
            ("{on}[{room}的]灯。", "请{on}[{room}的]灯。", "帮我{on}[{room}里的]灯。"),
            ("已{on}{room}的灯。", "{room}的灯已经{on}。"),
            ("{on}{room}和{room2}的灯。",),
        ),
        again="room",
    ),
    Tool(
        "light_dim",
        "home",
        ("dim light", "light brightness", "set brightness", "adjust light"),
        (_ROOM, Parameter("percent", "percent", "percent brightness level", "brightness in percent", "亮度百分比")),
        {"previous": "percent"},
        Wording(
            ("Set the brightness of a light", "Dim the light in a room"),
            "change the brightness",
            (
                "Dim the {room} light[ to {percent} percent].",
                "Set the brightness in the {room}[ to {percent} percent].",
                "Change the light level in the {room}[ to {percent} percent].",
            ),
            (
                "The light in the {room} went from {previous} to {percent} percent.",
                "{room}: {percent} percent instead of {previous}.",
            ),
        ),
        Wording(
            ("调节房间灯光亮度", "灯光亮度"),
            "调节亮度",
            ("把{room}的灯光亮度调到{percent}%。", "{room}的亮度设为{percent}%。"),
            ("{room}的亮度已从{previous}%调到{percent}%。", "{room}亮度由{previous}%改为{percent}%。"),
        ),
        again="room",
    ),
    Tool(
        "heating_set",
        "home",
        ("set heating", "set thermostat", "heating target", "room temperature"),
        (_ROOM, Parameter("degrees", "setpoint", "degrees target temperature", "target in celsius", "目标温度")),
        {"current": "setpoint"},
        Wording(
            ("Set the heating of a room", "Thermostat target of a room"),
            "set the heating",
            (
                "Heat the {room}[ to {degrees} degrees].",
                "Set the thermostat in the {room}[ to {degrees} degrees].",
                "I want {degrees} degrees in the {room}.",
            ),
            (
                "The {room} is at {current} degrees and heats to {degrees}.",
                "Heating in the {room} is set to {degrees} degrees, now {current}.",
            ),
        ),
        Wording(
            ("设置房间温度", "暖气温度"),
            "设置温度",
            ("把{room}温度调到{degrees}度。", "{room}的暖气设为{degrees}度。"),
            ("{room}目前{current}度，已设为{degrees}度。", "已把{room}设为{degrees}度，当前{current}度。"),
        ),
        again="room",
    ),
    Tool(
        "door_lock",
        "home",
        ("lock door", "set door lock", "door lock", "secure door"),
        (
            Parameter("door", "door", "door door_name entrance", "door"),
            Parameter("locked", "lock_unlock", "locked lock is_locked", "true to lock, false to unlock"),
        ),
        {"battery": "percent"},
        Wording(
            ("Lock or unlock a door", "Door lock control"),
            "reach the door lock",
            ("Please {locked} the {door}.", "Can you {locked} the {door}?", "I want you to {locked} the {door}."),
            (
                "The {door} is {locked}ed, battery {battery} percent.",
                "I {locked}ed the {door}. Its battery has {battery} percent.",
            ),
            ("Please {locked} the {door} and the {door2}.",),
        ),
        again="door",
    ),
)

NOTES = (
    Tool(
        "note_add",
        "notes",
        ("add note", "write note", "create note", "save note"),
        (Parameter("text", "sentence", "text content body note_text", "note text", "笔记内容"),),
        {"note_id": "note_id"},
        Wording(
            ("Save a note", "Write a new note"),
            "save the note",
            ('Note this down: "{text}"', 'Save a note that says "{text}"', 'Write a note: "{text}"'),
            ("Saved as note {note_id}.", "Your note is saved under {note_id}."),
        ),
        Wording(
            ("保存笔记", "新建笔记"),
            "保存笔记",
            ("记一条笔记：{text}。", "帮我记下“{text}”。"),
            ("已保存为笔记{note_id}。", "笔记{note_id}已保存。"),
        ),
    ),
    Tool(
        "note_find",
        "notes",
        ("find note", "search notes", "note search", "lookup note"),
        (Parameter("person", "person", "query keyword about term", "search words", "关键词"),),
        {"note_id": "note_id", "text": "sentence"},
        Wording(
            ("Search the notes", "Find a note by keyword"),
            "search your notes",
            ("Find my note about {person}.", "What did I write down about {person}?", "Search my notes for {person}."),
            ('Note {note_id} says: "{text}"', 'I found note {note_id}: "{text}"'),
        ),
        Wording(
            ("搜索笔记", "按关键词查笔记"),
            "搜索笔记",
            ("找一下关于{person}的笔记。", "我记过什么关于{person}的内容？"),
            ("笔记{note_id}写着：{text}。", "找到笔记{note_id}：{text}。"),
        ),
        again="person",
    ),
    Tool(
        "note_delete",
        "notes",
        ("delete note", "remove note", "erase note", "discard note"),
        (Parameter("note_id", "note_id", "note_id id note_number", "note number", "笔记编号"),),
        {"left": "count"},
        Wording(
            ("Delete a note by number", "Remove a note"),
            "delete the note",
            (
                "Delete note {note_id}.",
                "Please erase my note {note_id}.",
                "I no longer need note {note_id}, remove it.",
            ),
            ("Note {note_id} is deleted, {left} notes are left.", "I deleted {note_id}. You have {left} notes left."),
            ("Delete the notes {note_id} and {note_id2}.",),
        ),
        Wording(
            ("按编号删除笔记", "删除笔记"),
            "删除笔记",
            ("删除笔记{note_id}。", "笔记{note_id}不要了，删掉吧。"),
            ("笔记{note_id}已删除，还剩{left}条。", "已删除{note_id}，剩余{left}条笔记。"),
        ),
        again="note_id",
    ),
    Tool(
        "todo_add",
        "notes",
        ("add todo", "create task", "new todo item", "todo add"),
        (
            Parameter("task", "task", "task item title todo", "task", "待办事项"),
            Parameter("priority", "priority", "priority importance urgency", "priority", "优先级", False),
        ),
        {"open_tasks": "count"},
        Wording(
            ("Add a task to the to-do list", "New to-do item"),
            "add the task",
            (
                "Add {task} to my to-do list[ with {priority} priority].",
                "New task: {task}.[ Priority {priority}.]",
                "Put {task} on my list of tasks[, priority {priority}].",
            ),
            ("I added {task}. You have {open_tasks} open tasks.", "{task} is on your list, now {open_tasks} tasks."),
        ),
        Wording(
            ("添加待办事项", "新建待办"),
            "添加待办",
            ("把{task}加入待办[，优先级{priority}]。", "新增待办：{task}[，优先级为{priority}]。"),
            ("已添加{task}，现有{open_tasks}项待办。", "{task}已加入，共{open_tasks}项待办。"),
        ),
    ),
)

DAILY = (*WEATHER, *CALENDAR, *CLOCK, *HOME, *NOTES)
