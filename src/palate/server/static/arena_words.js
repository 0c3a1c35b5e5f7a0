// The words of the page for talking to models. word("key", {name: value}) in the language of the document.

const EN = {
  title_battle: "Which answer is better?", title_chat: "Chat",
  welcome_battle: "Two models of unknown name answer what you write. After each turn, say which answer is better.",
  welcome_chat: "Write something. Then say with a thumb whether the answer is good.",
  none_title: "No model is served here", none_text: "This server has no models to talk to. Start one with: palate label arena STORE --model A --model B",
  you: "You", side_left: "Answer A", side_right: "Answer B", side_one: "Answer", was: "This was {name}",
  write: "Write a message", send: "Send", stop: "Stop", fresh_battle: "New battle", fresh_chat: "New conversation",
  ask_vote: "Which answer is better?", vote_left: "A is better", vote_right: "B is better", vote_tie: "Tie", vote_both_bad: "Both bad",
  voted_left: "You chose A", voted_right: "You chose B", voted_tie: "You said: tie", voted_both_bad: "You said: both bad",
  up: "Good answer", down: "Bad answer", copy: "Copy", copied: "Copied", again: "Answer again", version: "version {n}",
  writing: "writing …", waiting: "waiting for its turn …", cut: "cut at the longest length", empty: "(an empty answer)",
  vote_now: "Both answers are complete. Vote with 1, 2, 3 or 4.", ready: "The answer is complete.", after_vote: "Thank you. Go on writing, or start anew.",
  first_vote: "Vote first: 1, 2, 3 or 4.", stopped: "Stopped. Your message is in the field again.", over: "This battle is over. Enter begins another.", keys_chat: "Esc, then 1 or 2: a thumb for the answer. / goes back to the field.",
  lost: "The connection broke. Your message is kept in this browser. Next try in {seconds} s.", problem: "Not answered: {error} {todo}", try_again: "Try again",
  kept: "Saved", not_kept: "Not saved: {error}",
};

const ZH = {
  title_battle: "哪个回答更好？", title_chat: "对话",
  welcome_battle: "两个匿名模型会回答您写的内容。每一轮之后，请说明哪个回答更好。",
  welcome_chat: "请写下您的问题，然后用拇指表示回答好不好。",
  none_title: "这里没有模型", none_text: "此服务器没有可对话的模型。启动方式：palate label arena STORE --model A --model B",
  you: "您", side_left: "回答 A", side_right: "回答 B", side_one: "回答", was: "这是 {name}",
  write: "写一条消息", send: "发送", stop: "停止", fresh_battle: "新对战", fresh_chat: "新对话",
  ask_vote: "哪个回答更好？", vote_left: "A 更好", vote_right: "B 更好", vote_tie: "一样好", vote_both_bad: "都不好",
  voted_left: "您选择了 A", voted_right: "您选择了 B", voted_tie: "您认为：一样好", voted_both_bad: "您认为：都不好",
  up: "好回答", down: "不好的回答", copy: "复制", copied: "已复制", again: "重新回答", version: "第 {n} 版",
  writing: "正在写……", waiting: "正在排队……", cut: "达到最大长度而截断", empty: "（空回答）",
  vote_now: "两个回答都已完成。请按 1、2、3 或 4 投票。", ready: "回答已完成。", after_vote: "谢谢。可以继续写，或重新开始。",
  first_vote: "请先投票：1、2、3 或 4。", stopped: "已停止。您的消息已回到输入框。", over: "此对战已结束。按 Enter 开始新的对战。", keys_chat: "按 Esc，再按 1 或 2 评价回答；按 / 回到输入框。",
  lost: "连接中断。您的消息已保留在此浏览器中。{seconds} 秒后重试。", problem: "没有回答：{error} {todo}", try_again: "再试一次",
  kept: "已保存", not_kept: "未保存：{error}",
};

export function word(key, values = {}) {
  const text = (document.documentElement.lang.startsWith("zh") ? ZH : EN)[key];
  return text.replace(/\{(\w+)\}/g, (whole, name) => (name in values ? values[name] : whole));
}
