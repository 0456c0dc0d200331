"""Chinese words that values are made of. `values.py` splits each list between training and held-out records."""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


CITIES = _words("""
北京 上海 广州 深圳 杭州 南京 苏州 成都 重庆 武汉 西安 长沙 郑州 青岛 大连 厦门 福州 昆明 贵阳 南宁 海口 三亚
哈尔滨 长春 沈阳 济南 合肥 南昌 太原 兰州 银川 西宁 拉萨 天津 宁波 无锡 温州 珠海 桂林 洛阳 烟台 扬州 徐州 绍兴
嘉兴
""")
SURNAMES = _words("""
王 李 张 刘 陈 杨 赵 黄 周 吴 徐 孙 胡 朱 高 林 何 郭 马 罗 梁 宋 郑 谢 韩 唐 冯 于 董 萧 程 曹 袁 邓 许
""")
GIVEN_NAMES = _words("""
伟 芳 娜 敏 静 丽 强 磊 军 洋 勇 艳 杰 娟 涛 明 超 霞 平 刚 建国 志强 晓明 小红 雪梅 文静 海燕 春华 秋月 子涵
雨欣 浩然 思远 嘉怡 梓萱 一鸣 佳宁 宇航 晨曦 欣怡 若曦 天宇 博文 雅琴 立新 家豪 婉清 书瑶 俊杰 丹丹
""")
LANGUAGES = _words("英语 法语 德语 日语 韩语 俄语 西班牙语 意大利语 葡萄牙语 泰语")
SUBJECTS = _words("我哥哥 老师 邻居 医生 我阿姨 司机 经理 客人 我妹妹 我朋友 律师 同事 王老板 房东 教练")
PREDICATES = _words("""
要去车站 在门口等你 想喝杯茶 要换钥匙 要买新手机 会晚一点到 要买两张票 有问题要问 去河边跑步 不用带伞 在家看书 会做晚饭
坐火车上班 想先付款 不在公司
""")
MOMENTS = _words("今天 今晚 明天 后天 周五 周日 这个周末 下周 明早 中午")
ROOMS = _words("客厅 厨房 主卧 次卧 书房 卫生间 餐厅 阳台 走廊 车库 儿童房 客房 地下室 衣帽间 工作室")
PLACES = _words(
    "机场 火车站 博物馆 图书馆 体育馆 大学 动物园 植物园 市政府 人民医院 音乐厅 会展中心 古城墙 科技馆 美术馆"
)
PLACE_CATEGORIES = _words("药店 面包店 停车场 书店 加油站 超市 咖啡馆 银行 健身房 花店")
CUISINES = _words("川菜 粤菜 湘菜 火锅 日料 韩餐 西餐 东北菜 江浙菜 清真菜 烧烤 素食")
COLORS = _words("黑色 白色 红色 绿色 灰色 蓝色 黄色 粉色")
PRODUCTS = _words(
    "背包 台灯 水壶 耳机 雨衣 办公椅 键盘 头盔 运动鞋 毛毯 手机壳 行李箱 围巾 挂钟 帐篷 瑜伽垫 雨伞 手套 书架 保温杯"
)
CHORES = _words(
    "浇花 买牛奶 交电费 喂猫 修自行车 洗车 换眼镜 办护照 看牙医 收拾行李 倒垃圾 备份电脑 取快递 打印车票 交房租"
)
MEETINGS = _words(
    "预算会 项目启动会 部门聚餐 设计评审 销售例会 瑜伽课 钢琴课 面试 家长会 读书会 培训课 看房 周会 体检 欢送会"
)
CANCEL_REASONS = _words("尺码不对 重复下单 太贵了 不需要了 颜色不对 送货太慢")
HOTEL_WORDS = _words("花园 皇冠 中心 湖滨 江景 金陵 云海 悦来 天府 锦绣")
RESTAURANT_WORDS = _words("老街 金桂 福满 竹林 小城 云上 江南 春风 四季 聚贤 望湖 青瓦 知味 一品 同乐")
SKIES = _words("晴 多云 小雨 阴 大风 小雪 雾")
AIR_LEVELS = _words("优 良 轻度污染 中度污染")
PARCEL_STATES = _words("运输中 派送中 已签收 已到驿站 等待揽收")
ORDER_STATES = _words("已发货 正在打包 已签收 待付款 待发货")
FLIGHT_STATES = _words("准点 延误 正在登机 已到达")
