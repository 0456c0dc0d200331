"""Tools for money: currencies, stocks, loans, bank accounts."""

from __future__ import annotations

from collections.abc import Mapping

from agentft.data.synthetic.tools import Json, Parameter, Tool, Wording
from agentft.data.synthetic.values import plain_number


def _converted(known: Mapping[str, Json]) -> Json:
    return plain_number(round(known["amount"] * known["rate"], 2))


def _monthly(known: Mapping[str, Json]) -> Json:
    rate = known["interest"] / 1200
    return plain_number(round(known["principal"] * rate / (1 - (1 + rate) ** (-12 * known["years"])), 2))


_FROM = Parameter("source", "currency", "from_currency source base from", "currency to convert from", "原货币")
_TO = Parameter("target", "currency2", "to_currency target quote to", "currency to convert to", "目标货币")
_PERSON = Parameter("person", "person", "name person full_name who", "full name", "姓名")

FINANCE = (
    Tool(
        "currency_convert",
        "finance",
        ("convert currency", "currency converter", "exchange money", "convert amount"),
        (Parameter("amount", "amount", "amount value sum", "amount", "金额"), _FROM, _TO),
        {"rate": "rate", "converted": _converted},
        Wording(
            ("Convert an amount of money", "Convert between currencies"),
            "convert the amount",
            (
                "Convert {amount} {source}[ to {target}].",
                "How much is {amount} {source}[ in {target}]?",
                "I have {amount} {source}. What is that[ in {target}]?",
            ),
            ("{amount} {source} is {converted} {target}.", "You get {converted} {target} for {amount} {source}."),
        ),
        Wording(
            ("货币换算", "换算金额"),
            "换算货币",
            ("{amount} {source}等于多少{target}？", "把{amount} {source}换成{target}。"),
            ("{amount} {source}等于{converted} {target}。", "可换{converted} {target}。"),
        ),
        again="amount",
    ),
    Tool(
        "currency_rate",
        "finance",
        ("exchange rate", "get currency rate", "currency rate", "fx rate"),
        (_FROM, _TO),
        {"rate": "rate", "date": "date"},
        Wording(
            ("Exchange rate of two currencies", "Rate between currencies"),
            "look up the exchange rate",
            (
                "What is the exchange rate from {source} to {target}?",
                "Show me the rate {source} to {target}.",
                "How does {source} stand against {target}?",
            ),
            ("One {source} is {rate} {target} as of {date}.", "The rate from {source} to {target} is {rate} ({date})."),
        ),
        Wording(
            ("查询汇率", "货币汇率"),
            "查询汇率",
            ("{source}对{target}的汇率是多少？", "查{source}兑{target}的汇率。"),
            ("1 {source}兑{rate} {target}（{date}）。", "{source}对{target}的汇率为{rate}，日期{date}。"),
        ),
    ),
    Tool(
        "stock_price",
        "finance",
        ("get stock price", "stock quote", "share price", "quote stock"),
        (Parameter("symbol", "symbol", "symbol ticker stock", "ticker symbol", "股票代码"),),
        {"amount": "price", "currency": lambda _: "USD"},
        Wording(
            ("Price of a stock in USD", "Share price in USD"),
            "look up the stock",
            (
                "What is the stock price[ of {symbol}]?",
                "How much is one share[ of {symbol}]?",
                "Give me a stock quote[ for {symbol}].",
            ),
            ("{symbol} trades at {amount} USD.", "One share of {symbol} costs {amount} USD."),
            ("What do the shares {symbol} and {symbol2} cost?", "Compare the stock prices of {symbol} and {symbol2}."),
        ),
        Wording(
            ("查询股价（美元）", "股票报价"),
            "查询股价",
            ("股票{symbol}现在多少钱？", "查一下{symbol}的股价。"),
            ("{symbol}现价{amount}美元。", "{symbol}的股价是{amount}美元。"),
            ("{symbol}和{symbol2}的股价各是多少？",),
        ),
        again="symbol",
    ),
    Tool(
        "loan_payment",
        "finance",
        ("loan payment", "calculate loan", "monthly payment", "loan calculator"),
        (
            Parameter("principal", "principal", "amount principal loan_amount", "loan amount"),
            Parameter("interest", "interest", "interest rate yearly_rate", "yearly rate in percent"),
            Parameter("years", "years", "years term_years duration", "years"),
        ),
        {"monthly": _monthly},
        Wording(
            ("Monthly payment of a loan", "Calculate a loan"),
            "calculate the loan",
            (
                "What do I pay a month for a loan of {principal} at {interest} percent[ over {years} years]?",
                "Calculate a loan: {principal} dollars, {interest} percent[, {years} years].",
            ),
            ("You pay {monthly} a month for {years} years.", "The monthly payment is {monthly} over {years} years."),
        ),
    ),
)

BANK = (
    Tool(
        "account_balance",
        "bank",
        ("account balance", "get balance", "check balance", "show account"),
        (Parameter("account", "account", "account account_number account_id", "account number", "账号"),),
        {"balance": "price"},
        Wording(
            ("Balance of an account", "Money in an account"),
            "read the balance",
            (
                "How much money is in my account[ {account}]?",
                "Show the balance of my account[ {account}].",
                "What is the balance[ of account {account}]?",
            ),
            ("Account {account} holds {balance} dollars.", "The balance of {account} is {balance} dollars."),
            ("What are the balances of my accounts {account} and {account2}?",),
        ),
        Wording(
            ("查询账户余额", "账户余额"),
            "查询余额",
            ("账户{account}还有多少钱？", "查{account}的余额。"),
            ("账户{account}余额{balance}元。", "{account}的余额是{balance}元。"),
            ("账户{account}和{account2}各有多少钱？",),
        ),
        again="account",
    ),
    Tool(
        "money_transfer",
        "bank",
        ("transfer money", "send money", "make transfer", "pay person"),
        (
            _PERSON,
            Parameter("amount", "amount", "amount sum value", "amount in dollars", "金额"),
            Parameter("note", "event", "note reference purpose", "reference", "备注", False),
        ),
        {"transfer": "booking"},
        Wording(
            ("Transfer money to a person", "Send money"),
            "send the money",
            (
                "Send {amount} dollars to {person}[ with the note {note}].",
                "Transfer {amount} dollars[ to {person}][, reference {note}].",
                "Please pay {person} {amount} dollars[ for {note}].",
            ),
            (
                "{amount} dollars went to {person}, transfer {transfer}.",
                "Transfer {transfer}: {amount} dollars to {person}.",
            ),
        ),
        Wording(
            ("转账", "给他人转账"),
            "转账",
            ("给{person}转{amount}元[，备注{note}]。", "转账{amount}元给{person}[，附言{note}]。"),
            ("已向{person}转账{amount}元，流水号{transfer}。", "{amount}元已转给{person}，流水号{transfer}。"),
        ),
    ),
    Tool(
        "card_block",
        "bank",
        ("block card", "freeze card", "lock card", "stop card"),
        (Parameter("card", "card", "card last_digits card_number", "last four digits", "卡号后四位"),),
        {"case": "ticket"},
        Wording(
            ("Block a bank card", "Freeze a lost card"),
            "block the card",
            (
                "I lost my card[ ending in {card}], block it.",
                "Please freeze my card[ with the last digits {card}].",
                "Block the card[ ending in {card}].",
            ),
            ("The card ending in {card} is blocked, case {case}.", "I blocked your card {card}. The case is {case}."),
            ("Block my cards ending in {card} and {card2}.",),
        ),
        Wording(
            ("冻结银行卡", "挂失"),
            "冻结银行卡",
            ("尾号{card}的卡丢了，请冻结。", "冻结尾号{card}的银行卡。"),
            ("尾号{card}的卡已冻结，受理号{case}。", "已冻结尾号{card}的卡，受理号{case}。"),
        ),
        again="card",
    ),
)

MONEY = (*FINANCE, *BANK)
