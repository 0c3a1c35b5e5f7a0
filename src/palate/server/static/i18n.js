// The page's own words. t("key", {name: value}) in the chosen language; a missing word falls back to English.

import { load, save } from "./store.js";

const EN = {
  app: "palate", skip_link: "To the item", instructions: "Instructions", no_instructions: "No instructions were written.",
  prompt: "Prompt", conversation: "Conversation", response: "Response {letter}", the_response: "Response",
  role_user: "User", role_assistant: "Assistant", role_system: "System", picture: "Picture {n}", enlarge: "enlarge", close: "Close",
  progress: "{done} of {wanted}", progress_label: "Your progress", undo: "Undo", skip: "Skip", flag: "Report", submit: "Submit", keys: "Keys", logout: "Log out",
  theme: "Colours", theme_auto: "System", theme_light: "Light", theme_dark: "Dark", language: "Language", admin: "Overview", annotate: "Annotate",
  optional: "(optional)", ask_compare: "Which is better?", ask_rank: "Order from best to worst", ask_rating: "Rating", ask_flags: "What is wrong with it?",
  ask_spans: "Mark what is wrong", ask_rewrite: "Write it as it should be", ask_accept: "A good response?", ask_text: "Notes",
  tie: "Tie", both_bad: "Both bad", better_end: "{letter} is better", how_much: "{letter} is better: by how much?",
  short_3_3: "much", short_3_2: "clearly", short_3_1: "slightly", short_2_2: "clearly", short_2_1: "slightly",
  strength_3_3: "{letter} is much better", strength_3_2: "{letter} is clearly better", strength_3_1: "{letter} is slightly better",
  strength_2_2: "{letter} is clearly better", strength_2_1: "{letter} is slightly better",
  good: "Good", not_good: "Not good", ticked: "{what}: ticked", unticked: "{what}: not ticked", unchanged: "unchanged",
  restore: "Restore the original", difference: "The response with your changes", changes: "{out} taken out, {in} put in",
  spans_text: "Text of response {letter}, to mark words in", marks: "Marks", no_marks: "no marks", comment: "comment", comment_on: "Comment on “{what}”",
  remove_mark: "Remove the mark on “{what}”", removed: "{what}: mark removed", spans_how: "Select words with the mouse, or with the arrow keys; then choose what it is.",
  which_kind: "What is it?", how_bad: "{kind}: how bad?", moves: "move", ties: "tie", word: "word", more: "more", leave: "leave the field",
  place: "Place {n}", place_of: "{letter}: place {n} of {all}", tied_with: "tied with {letters}", move_up: "move up", move_down: "move down", tie_above: "tie with the one above", untie: "end the tie",
  state_sending: "Sending …", state_sent: "Saved", state_waiting: "Not saved yet. The server cannot be reached; your answer is kept in this browser. Next try in {seconds} s.",
  state_waiting_read: "The server cannot be reached. Next try in {seconds} s.", state_kept: "An answer of an earlier visit was kept here. Sending it now.",
  state_restored: "Your unfinished answer is back.", try_now: "Try now", saved_undo: "Taken back", saved_skip: "Skipped", saved_flag: "Reported", state_back: "The server is back. Saved.",
  state_up: "The server is back.", state_new: "New item, {n} to answer.", missing: "Still to answer: {what}.", refused: "Not saved: {error}", late: "Kept, but not counted: you had this item for too long and it went to somebody else.",
  nothing_to_undo: "There is nothing to undo.", undo_again: "Your answer is shown again. Change it and submit.",
  done_title: "Nothing to do now", look_again: "Look again", undo_last: "Undo the last answer", loading: "Loading …",
  skip_title: "Skip this item", skip_why: "Why? It helps whoever runs this task.", skip_unsure: "I cannot judge this", skip_broken: "The text is broken or empty", skip_language: "A language that I do not read",
  skip_upset: "I do not want to read this", skip_other: "Another reason", reason: "In your words (optional)", cancel: "Cancel",
  flag_title: "Report a problem with this item", flag_why: "What is wrong? The item stays open for you to answer or skip.", send: "Send",
  same_title: "Is this your order?", same_text: "You did not change the order in which the responses were shown. Submit it if you mean it.", same_yes: "Yes, submit", same_no: "Go back",
  help_title: "Keys", help_all: "Everywhere", help_enter: "next question; at the end: submit", help_submit: "submit, from anywhere", help_steps: "next, previous question", help_undo: "undo the last answer or skip",
  help_skip: "skip", help_flag: "report a problem", help_view: "instructions, show or hide", help_help: "this help", help_esc: "leave a field, close a window",
  help_compare: "A or B is better; tie; both bad", help_strength: "by how much", help_scale: "along the scale", help_rating: "rate, and go on", help_flags: "tick", help_accept: "good, not good",
  help_rank_choose: "choose a response", help_rank_put: "put it in that place", help_rank_move: "move it up, down, in and out of ties", help_rank_tie: "tie with the one above, or end the tie",
  help_words: "choose a word", help_extend: "more words", help_kind: "what it is, then how bad", help_marks: "go through the marks", help_comment: "comment", help_remove: "remove the mark", help_write: "submit from the text field",
  login_title: "Log in", login_doing: "Logging in …", login_open: "Open the login link that you were given, or paste it here.", login_field: "Login link", login_go: "Log in", login_net: "The server cannot be reached. Try again.",
  login_again: "Your session has ended, or you are not logged in. What you had not sent yet is kept in this browser.",
  overview: "Overview", adjudicate: "Decide", people: "People", answers: "Answers", items_done: "Items complete", contested: "Contested", reports: "Reports", skipped_by_all: "Skipped by all", late_answers: "Late", refresh: "Refresh",
  agreement: "Agreement", agreement_help: "Krippendorff’s alpha of each question with its 95 % interval: 1 = always agree, 0 = as by chance.", question: "Question", alpha: "Alpha", interval: "95 % interval", items: "Items", ratings: "Ratings", not_defined: "not defined: {why}",
  annotators: "Annotators", annotator: "Annotator", median_seconds: "Median s", gold: "Gold", attention: "Attention", repeat: "Same again", same_order: "Sent unchanged", first_side: "First preferred", last_answer: "Last answer", flags: "Flags",
  fit_model: "Fit the annotator model", fitting: "Fitting …", model_few: "The annotator model needs at least 20 votes of two people.", reliability: "Reliability", left_bias: "Left bias",
  flag_gold: "Misses known answers: {share} right of {of}", flag_attention: "Misses attention checks: {share} right of {of}", flag_repeat: "Answers otherwise the second time: {share} alike of {of}", flag_unchanged: "Rankings sent unchanged: {share} of {of}", flag_first: "Prefers one side: first shown preferred in {share} of {of}",
  annotators_help: "Share and number of cases. Flags are the page’s own hints; look at the answers before you judge a person.",
  drift: "By week", week: "Week", no_preference: "No preference", drift_one: "There is one week so far.", contested_items: "Contested items", contested_none: "No item is contested.", disagreement: "Disagreement", decided: "decided", open: "open", decide_next: "Decide the next one",
  others: "What was answered", nothing_contested: "Nothing to decide", role: "Role", name: "Name", add_person: "Add somebody", role_annotator: "annotator", role_adjudicator: "adjudicator", role_admin: "admin", inactive: "may not log in",
  link_once: "Login link for {name}. It works once; send it in private.", copy: "Copy", copied: "Copied", last_hash: "Last hash of the log", last_hash_help: "Note it elsewhere: palate label verify STORE --after HASH proves later that nothing was cut off.", no_answers: "No answers yet.", not_admin: "The overview is for admins. You may decide about contested items.", not_allowed: "This page is for adjudicators and admins.",
};

const ZH = {
  app: "palate", skip_link: "跳到题目", instructions: "说明", no_instructions: "没有填写说明。",
  prompt: "提示", conversation: "对话", response: "回答 {letter}", the_response: "回答",
  role_user: "用户", role_assistant: "助手", role_system: "系统", picture: "图片 {n}", enlarge: "放大", close: "关闭",
  progress: "{done} / {wanted}", progress_label: "您的进度", undo: "撤销", skip: "跳过", flag: "报告问题", submit: "提交", keys: "按键", logout: "退出登录",
  theme: "颜色", theme_auto: "跟随系统", theme_light: "浅色", theme_dark: "深色", language: "语言", admin: "总览", annotate: "标注",
  optional: "（可不填）", ask_compare: "哪个更好？", ask_rank: "从最好到最差排序", ask_rating: "评分", ask_flags: "有什么问题？",
  ask_spans: "标出有问题的地方", ask_rewrite: "改写成应有的样子", ask_accept: "这个回答好吗？", ask_text: "备注",
  tie: "一样好", both_bad: "都不好", better_end: "{letter} 更好", how_much: "{letter} 更好：好多少？",
  short_3_3: "好很多", short_3_2: "明显", short_3_1: "略好", short_2_2: "明显", short_2_1: "略好",
  strength_3_3: "{letter} 好很多", strength_3_2: "{letter} 明显更好", strength_3_1: "{letter} 略好",
  strength_2_2: "{letter} 明显更好", strength_2_1: "{letter} 略好",
  good: "好", not_good: "不好", ticked: "{what}：已勾选", unticked: "{what}：未勾选", unchanged: "未改动",
  restore: "恢复原文", difference: "带有您改动的回答", changes: "删去 {out} 处，加入 {in} 处",
  spans_text: "回答 {letter} 的文字，可标记词语", marks: "标记", no_marks: "没有标记", comment: "评语", comment_on: "对“{what}”的评语",
  remove_mark: "删除“{what}”的标记", removed: "{what}：标记已删除", spans_how: "用鼠标或方向键选择词语，然后选择它的问题类型。",
  which_kind: "是什么问题？", how_bad: "{kind}：有多严重？", moves: "移动", ties: "并列", word: "词语", more: "更多", leave: "离开输入框",
  place: "第 {n} 位", place_of: "{letter}：第 {n} 位，共 {all} 位", tied_with: "与 {letters} 并列", move_up: "上移", move_down: "下移", tie_above: "与上一个并列", untie: "取消并列",
  state_sending: "正在发送……", state_sent: "已保存", state_waiting: "尚未保存。无法连接服务器；您的答案已保留在此浏览器中。{seconds} 秒后重试。",
  state_waiting_read: "无法连接服务器。{seconds} 秒后重试。", state_kept: "上次有一个答案未发出，现在发送。",
  state_restored: "您未完成的答案已恢复。", try_now: "立即重试", saved_undo: "已撤销", saved_skip: "已跳过", saved_flag: "已报告", state_back: "服务器已恢复。已保存。",
  state_up: "服务器已恢复。", state_new: "新题目，共 {n} 项要回答。", missing: "还需回答：{what}。", refused: "未保存：{error}", late: "已保留但不计入：时间过长，此题已交给他人。",
  nothing_to_undo: "没有可撤销的。", undo_again: "您的答案已重新显示。请修改后提交。",
  done_title: "现在没有任务", look_again: "再看看", undo_last: "撤销上一个答案", loading: "正在加载……",
  skip_title: "跳过此题", skip_why: "为什么？这对任务负责人有帮助。", skip_unsure: "我无法判断", skip_broken: "文字损坏或为空", skip_language: "我看不懂这种语言",
  skip_upset: "我不想读这个", skip_other: "其他原因", reason: "用您自己的话（可不填）", cancel: "取消",
  flag_title: "报告此题的问题", flag_why: "有什么问题？此题仍可继续回答或跳过。", send: "发送",
  same_title: "这是您的排序吗？", same_text: "您没有改动回答的显示顺序。如果这就是您的排序，请提交。", same_yes: "是，提交", same_no: "返回",
  help_title: "按键", help_all: "通用", help_enter: "下一项；最后一项时提交", help_submit: "随时提交", help_steps: "下一项、上一项", help_undo: "撤销上一个答案或跳过",
  help_skip: "跳过", help_flag: "报告问题", help_view: "显示或隐藏说明", help_help: "此帮助", help_esc: "离开输入框，关闭窗口",
  help_compare: "A 或 B 更好；一样好；都不好", help_strength: "好多少", help_scale: "沿刻度移动", help_rating: "评分并继续", help_flags: "勾选", help_accept: "好、不好",
  help_rank_choose: "选择一个回答", help_rank_put: "放到该位", help_rank_move: "上移、下移，并入或离开并列", help_rank_tie: "与上一个并列，或取消并列",
  help_words: "选择一个词", help_extend: "更多词", help_kind: "问题类型，然后严重程度", help_marks: "浏览标记", help_comment: "评语", help_remove: "删除标记", help_write: "在输入框中提交",
  login_title: "登录", login_doing: "正在登录……", login_open: "请打开您收到的登录链接，或粘贴在这里。", login_field: "登录链接", login_go: "登录", login_net: "无法连接服务器。请重试。",
  login_again: "您的会话已结束，或尚未登录。未发出的内容保留在此浏览器中。",
  overview: "总览", adjudicate: "裁决", people: "人员", answers: "答案", items_done: "完成的题目", contested: "有争议", reports: "报告", skipped_by_all: "所有人跳过", late_answers: "迟到", refresh: "刷新",
  agreement: "一致性", agreement_help: "各问题的 Krippendorff alpha 及 95 % 区间：1 = 总是一致，0 = 与随机相同。", question: "问题", alpha: "Alpha", interval: "95 % 区间", items: "题目", ratings: "评价数", not_defined: "未定义：{why}",
  annotators: "标注者", annotator: "标注者", median_seconds: "中位秒数", gold: "已知答案", attention: "注意力", repeat: "再次相同", same_order: "未改动提交", first_side: "偏好第一个", last_answer: "最近答案", flags: "提示",
  fit_model: "拟合标注者模型", fitting: "正在拟合……", model_few: "标注者模型至少需要两个人的 20 票。", reliability: "可靠度", left_bias: "偏左",
  flag_gold: "答错已知题：{of} 题中答对 {share}", flag_attention: "未通过注意力检查：{of} 题中通过 {share}", flag_repeat: "第二次答案不同：{of} 题中相同 {share}", flag_unchanged: "未改动的排序：{of} 中的 {share}", flag_first: "偏好一侧：{of} 中有 {share} 选第一个",
  annotators_help: "比例与例数。提示仅供参考；评价一个人之前请先看答案。",
  drift: "按周", week: "周", no_preference: "无偏好", drift_one: "目前只有一周。", contested_items: "有争议的题目", contested_none: "没有有争议的题目。", disagreement: "分歧", decided: "已裁决", open: "待裁决", decide_next: "裁决下一题",
  others: "已有的答案", nothing_contested: "没有要裁决的", role: "角色", name: "姓名", add_person: "添加人员", role_annotator: "标注者", role_adjudicator: "裁决者", role_admin: "管理员", inactive: "不能登录",
  link_once: "{name} 的登录链接。只能用一次；请私下发送。", copy: "复制", copied: "已复制", last_hash: "日志的最后哈希", last_hash_help: "请另行记下：以后用 palate label verify STORE --after HASH 可证明没有被截断。", no_answers: "还没有答案。", not_admin: "总览仅供管理员使用。您可以裁决有争议的题目。", not_allowed: "此页面供裁决者和管理员使用。",
};

const WORDS = { en: EN, zh: ZH };
let language = "en";

export const LANGUAGES = { en: "English", zh: "中文" };

export function useLanguage(otherwise) {
  const chosen = load("language");
  language = WORDS[chosen] ? chosen : WORDS[otherwise] ? otherwise : "en";
  document.documentElement.lang = language === "zh" ? "zh-Hans" : "en";
  return language;
}

export const chooseLanguage = (name) => save("language", name);

export function t(key, values = {}) {
  const text = WORDS[language][key] ?? EN[key] ?? key;
  return text.replace(/\{(\w+)\}/g, (whole, name) => (name in values ? values[name] : whole));
}

// What both languages must have: for the tests.
export const missingWords = () => [...Object.keys(EN).filter((key) => !(key in ZH)), ...Object.keys(ZH).filter((key) => !(key in EN))];
