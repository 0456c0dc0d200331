"""Tools for people, language, units, libraries and office machines."""

from __future__ import annotations

from collections.abc import Mapping

from agentft.data.synthetic.tools import Json, Parameter, Tool, Wording
from agentft.data.synthetic.values import plain_number
from agentft.data.synthetic.words_en import DICTIONARY

_METERS = {"km": 1000.0, "miles": 1609.344, "m": 1.0, "feet": 0.3048, "inches": 0.0254, "cm": 0.01, "yards": 0.9144}


def _length(known: Mapping[str, Json]) -> Json:
    return plain_number(round(known["measure"] * _METERS[known["source"]] / _METERS[known["target"]], 2))


def _bmi(known: Mapping[str, Json]) -> Json:
    return plain_number(round(known["kilograms"] / (known["height"] / 100) ** 2, 1))


def _meaning(known: Mapping[str, Json]) -> Json:
    return DICTIONARY[known["word"]][0]


def _synonyms(known: Mapping[str, Json]) -> Json:
    return list(DICTIONARY[known["word"]][1])


_PERSON = Parameter("person", "person", "name person full_name who", "full name", "姓名")

PEOPLE = (
    Tool(
        "contact_find",
        "people",
        ("find contact", "lookup contact", "search contacts", "get phone number"),
        (_PERSON,),
        {"phone": "phone"},
        Wording(
            ("Phone number of a contact", "Find a contact"),
            "find the contact",
            (
                "What is the phone number of {person}?",
                "Find {person} in my contacts.",
                "How can I reach {person} by phone?",
            ),
            ("The number of {person} is {phone}.", "You reach {person} at {phone}."),
            ("What are the phone numbers of {person} and {person2}?",),
        ),
        Wording(
            ("查找联系人电话", "联系人查询"),
            "查找联系人",
            ("{person}的电话是多少？", "在通讯录里找{person}。"),
            ("{person}的电话是{phone}。", "{person}：{phone}。"),
            ("{person}和{person2}的电话各是多少？",),
        ),
        again="person",
    ),
    Tool(
        "message_send",
        "people",
        ("send message", "send text", "text message", "send sms"),
        (
            Parameter("phone", "phone", "phone number to", "phone number", "电话号码"),
            Parameter("message", "message", "text message content", "text", "内容"),
        ),
        {"sent": "time"},
        Wording(
            ("Send a text message", "Text a phone number"),
            "send the message",
            (
                'Text {phone}: "{message}"',
                'Send "{message}" to {phone}.',
                'Write a message to {phone}[ that says "{message}"].',
            ),
            ("Your message went to {phone} at {sent}.", "Sent to {phone} at {sent}."),
        ),
        Wording(
            ("发送短信", "发消息"),
            "发送短信",
            ("给{phone}发短信：{message}。", "发“{message}”到{phone}。"),
            ("短信已于{sent}发到{phone}。", "{sent}已发送给{phone}。"),
        ),
    ),
    Tool(
        "email_send",
        "people",
        ("send email", "write email", "email send", "mail message"),
        (
            Parameter("email", "email", "to email recipient address", "email address"),
            Parameter("event", "event", "subject title topic", "subject"),
        ),
        {"sent": "time"},
        Wording(
            ("Send an email", "Write an email"),
            "send the email",
            (
                "Send an email to {email}[ with the subject {event}].",
                "Email {email}[ about {event}].",
                "Write to {email}[, subject {event}].",
            ),
            ("The email to {email} left at {sent}.", "Your email about {event} was sent to {email} at {sent}."),
        ),
        again="email",
    ),
    Tool(
        "contact_add",
        "people",
        ("add contact", "save contact", "new contact", "create contact"),
        (_PERSON, Parameter("phone", "phone", "phone number phone_number", "phone number", "电话号码")),
        {"contacts": "index"},
        Wording(
            ("Save a new contact", "Add a contact"),
            "save the contact",
            (
                "Save {person} with the number {phone}.",
                "Add {person} to my contacts[, phone {phone}].",
                "New contact: {person}[, {phone}].",
            ),
            (
                "{person} is saved with {phone}, you now have {contacts} contacts.",
                "Saved {person}, {phone}. That makes {contacts} contacts.",
            ),
        ),
        Wording(
            ("保存联系人", "新建联系人"),
            "保存联系人",
            ("保存联系人{person}，电话{phone}。", "把{person}加到通讯录，号码{phone}。"),
            ("已保存{person}，{phone}，共{contacts}位联系人。", "{person}（{phone}）已加入通讯录，共{contacts}位。"),
        ),
    ),
)

LANGUAGE = (
    Tool(
        "translate",
        "language",
        ("translate text", "translate", "text translation", "run translation"),
        (
            Parameter("sentence", "sentence", "text sentence source_text", "text", "原文"),
            Parameter("language", "language", "language target_language to", "target language", "目标语言"),
        ),
        {"translation_id": "note_id"},
        Wording(
            ("Translate a text into a file", "Translate text to a language"),
            "translate the text",
            (
                'Translate "{sentence}"[ into {language}].',
                'How do you say "{sentence}"[ in {language}]?',
                'Put this[ into {language}]: "{sentence}"',
            ),
            (
                "The {language} translation is stored as {translation_id}.",
                "Your {language} text is ready: {translation_id}.",
            ),
        ),
        Wording(
            ("翻译文本并存档", "翻译"),
            "翻译",
            ("把“{sentence}”翻译成{language}。", "“{sentence}”用{language}怎么说？"),
            ("{language}译文已存为{translation_id}。", "译成{language}，编号{translation_id}。"),
        ),
        again="language",
    ),
    Tool(
        "word_define",
        "language",
        ("define word", "dictionary", "word meaning", "lookup word"),
        (Parameter("word", "word", "word term entry", "word"),),
        {"meaning": _meaning},
        Wording(
            ("Meaning of a word", "Dictionary entry"),
            "look up the word",
            ("What does the word {word} mean?", "Define {word}.", "Give me the meaning of {word}."),
            ("{word} means {meaning}.", "The word {word} means {meaning}."),
            ("What do the words {word} and {word2} mean?",),
        ),
        again="word",
    ),
    Tool(
        "word_synonyms",
        "language",
        ("find synonyms", "word synonyms", "thesaurus", "similar words"),
        (Parameter("word", "word", "word term base_word", "word"),),
        {"synonyms": _synonyms},
        Wording(
            ("Synonyms of a word", "Words with a similar meaning"),
            "find synonyms",
            ("Give me synonyms for {word}.", "What are other words for {word}?", "Which words can replace {word}?"),
            ("Synonyms for {word} are {synonyms}.", "Instead of {word} you can say {synonyms}."),
            ("Give me synonyms for {word} and for {word2}.",),
        ),
        again="word",
    ),
)

UNITS = (
    Tool(
        "length_convert",
        "units",
        ("convert length", "length converter", "convert distance", "unit convert length"),
        (
            Parameter("measure", "measure", "value amount length", "value"),
            Parameter("source", "length_unit", "from_unit source unit", "unit of the value"),
            Parameter("target", "length_unit2", "to_unit target target_unit", "wanted unit"),
        ),
        {"converted": _length},
        Wording(
            ("Convert a length", "Convert units of length"),
            "convert the length",
            (
                "How long is {measure} {source}[ in {target}]?",
                "Convert {measure} {source}[ to {target}].",
                "What is {measure} {source}[ in {target}]?",
            ),
            ("{measure} {source} are {converted} {target}.", "That is {converted} {target}."),
        ),
        again="measure",
    ),
    Tool(
        "body_index",
        "units",
        ("body mass index", "calculate bmi", "get bmi", "bmi calculator"),
        (
            Parameter("kilograms", "mass", "weight weight_kg kilograms", "weight in kg", "体重（公斤）"),
            Parameter("height", "height", "height height_cm size", "height in cm", "身高（厘米）"),
        ),
        {"bmi": _bmi},
        Wording(
            ("Body mass index", "Calculate the BMI"),
            "calculate the index",
            (
                "I weigh {kilograms} kg[ and am {height} cm tall]. What is my BMI?",
                "Calculate the body mass index for {kilograms} kg[ and {height} cm].",
                "BMI of a person with {kilograms} kg[ and {height} cm]?",
            ),
            ("The body mass index is {bmi}.", "With {kilograms} kg and {height} cm the BMI is {bmi}."),
        ),
        Wording(
            ("计算BMI", "体重指数"),
            "计算BMI",
            ("我{kilograms}公斤[，{height}厘米]，BMI是多少？", "计算体重{kilograms}公斤[、身高{height}厘米]的BMI。"),
            ("BMI是{bmi}。", "{kilograms}公斤、{height}厘米的BMI为{bmi}。"),
        ),
    ),
)

LIBRARY = (
    Tool(
        "book_find",
        "library",
        ("find book", "search books", "book search", "library search"),
        (Parameter("title", "title", "title book_title name", "book title"),),
        {"book_id": "book_id", "shelf": "count"},
        Wording(
            ("Find a book in the library", "Search the library"),
            "search the library",
            ('Do you have the book "{title}"?', 'Find "{title}" in the library.', 'On which shelf is "{title}"?'),
            ("{title} is on shelf {shelf}, number {book_id}.", "We have {title}, number {book_id}, on shelf {shelf}."),
            ('Do you have the books "{title}" and "{title2}"?',),
        ),
        again="title",
    ),
    Tool(
        "book_reserve",
        "library",
        ("reserve book", "book reservation", "hold book", "request book"),
        (
            Parameter("book_id", "book_id", "book_id book book_number", "book number"),
            Parameter("days", "days", "days hold_days for_days", "days to hold", required=False),
        ),
        {"ready": "date"},
        Wording(
            ("Reserve a book", "Put a book on hold"),
            "reserve the book",
            (
                "Reserve book {book_id}[ for {days} days].",
                "Please hold {book_id} for me[, for {days} days].",
                "I would like to reserve {book_id}[ for {days} days].",
            ),
            ("Book {book_id} is ready for you on {ready}.", "I reserved {book_id}. You can fetch it on {ready}."),
            ("Reserve the books {book_id} and {book_id2}.",),
        ),
        again="book_id",
    ),
    Tool(
        "book_renew",
        "library",
        ("renew book", "extend loan", "renew loan", "prolong book"),
        (
            Parameter("book_id", "book_id", "book_id book item", "book number"),
            Parameter("days", "days", "days extra_days extension", "more days"),
        ),
        {"due": "date"},
        Wording(
            ("Extend the loan of a book", "Renew a book"),
            "renew the book",
            (
                "Renew {book_id}[ for {days} days].",
                "I need book {book_id} longer[, {days} more days].",
                "Extend my loan of {book_id}[ by {days} days].",
            ),
            ("Book {book_id} is now due on {due}.", "You can keep {book_id} until {due}."),
        ),
        again="book_id",
    ),
)

OFFICE = (
    Tool(
        "ticket_create",
        "office",
        ("create ticket", "open ticket", "report issue", "new support ticket"),
        (
            Parameter("issue", "issue", "subject issue problem", "problem"),
            Parameter("priority", "priority", "priority urgency level", "priority", required=False),
        ),
        {"ticket": "ticket"},
        Wording(
            ("Open a support ticket", "Report a problem"),
            "open the ticket",
            (
                "Open a ticket: {issue}.[ Priority {priority}.]",
                "Report this to support: {issue}[, {priority} priority].",
                "We have a problem, {issue}. Open a ticket[ with {priority} priority].",
            ),
            ("Ticket {ticket} is open: {issue}.", "I opened {ticket} for: {issue}."),
        ),
    ),
    Tool(
        "ticket_status",
        "office",
        ("ticket status", "get ticket", "check ticket", "support ticket info"),
        (Parameter("ticket", "ticket", "ticket ticket_id id", "ticket number"),),
        {"status": "ticket_state"},
        Wording(
            ("Status of a support ticket", "Look up a ticket"),
            "check the ticket",
            ("What about ticket {ticket}?", "Is {ticket} solved yet?", "Check the status of ticket {ticket}."),
            ("Ticket {ticket} is {status}.", "The status of {ticket} is: {status}."),
            ("What is the status of the tickets {ticket} and {ticket2}?",),
        ),
        again="ticket",
    ),
    Tool(
        "server_status",
        "office",
        ("server status", "check server", "host status", "ping host"),
        (Parameter("host", "host", "host server machine", "server"),),
        {"status": "server_state", "load": "percent"},
        Wording(
            ("Status of a server", "Check a server"),
            "check the server",
            ("Is the server {host} up?", "What is the status of {host}?", "Check the server {host}."),
            (
                "{host} is {status} with a load of {load} percent.",
                "The server {host} is {status}, load {load} percent.",
            ),
            ("Check the servers {host} and {host2}.",),
        ),
        again="host",
    ),
    Tool(
        "server_restart",
        "office",
        ("restart server", "reboot server", "server restart", "reboot host"),
        (Parameter("host", "host", "host server machine_name", "server"),),
        {"back": "time"},
        Wording(
            ("Restart a server", "Reboot a server"),
            "restart the server",
            ("Restart {host}.", "Please reboot the server {host}.", "The server {host} hangs, restart it."),
            ("{host} restarts and is back at {back}.", "The server {host} will be back at {back}."),
            ("Restart the servers {host} and {host2}.",),
        ),
        again="host",
    ),
)

PEOPLE_AND_OFFICE = (*PEOPLE, *LANGUAGE, *UNITS, *LIBRARY, *OFFICE)
