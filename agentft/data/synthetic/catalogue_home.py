"""Tools at home: lights, heating, doors, notes."""

from __future__ import annotations

from agentft.data.synthetic.tools import Parameter, Tool, Wording

_ROOM = Parameter("room", "room", "room room_name area where", "room", "房间")

HOME = (
    Tool(
        "light_switch",
        "home",
        ("switch light", "light power", "toggle light", "set light"),
        (_ROOM, Parameter("on", "on_off", "on power turn_on is_on", "true for on, false for off", "是否打开")),
        {"lights": "count"},
        Wording(
            ("Switch a light on or off", "Light on or off in a room"),
            "switch the light",
            (
                "Turn {on} the light[ in the {room}].",
                "Switch the light {on}[ in the {room}], please.",
                "Lights {on}[ in the {room}].",
            ),
            ("{lights} lights in the {room} are now {on}.", "Done, {lights} lights are {on} in the {room}."),
            ("Turn {on} the light in the {room} and in the {room2}.",),
        ),
        Wording(
            ("开关房间的灯", "灯光开关"),
            "控制灯光",
            ("{on}[{room}的]灯。", "请{on}[{room}的]灯。", "帮我{on}[{room}里的]灯。"),
            ("已{on}{room}的{lights}盏灯。", "{room}的{lights}盏灯已{on}。"),
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

AT_HOME = (*HOME, *NOTES)
