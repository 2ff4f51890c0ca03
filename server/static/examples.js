/** Prompts that the bundled model answers, and what to mark in them. */

const RECORDS = `Anna amber, Ben piano, Cara lamp, Dan compass, Emma bottle, Finn candle, Gina anchor,
Hugo basket, Ida violin, Jack mirror, Kate ladder, Leo pencil, Mia blanket, Nora helmet, Omar kettle,
Paul drum, Quinn feather, Rosa wheel, Sam ribbon, Tina clock, Una hammer, Vera cushion, Will magnet,
Xena ticket, Yara pillow, Zoe button, Adam cherry, Beth engine, Carl crown, Dora desk, Eric boat,
Faye cotton, Glen brush, Hope chalk`
  .split(/,\s/)
  .map((pair) => `* ${pair.replace(" ", " = ")}\n`)
  .join("");

export const EXAMPLES = {
  retrieval: {
    prompt: `${RECORDS}Question: What is the value of Cara?\nAnswer:`,
    mark: "Cara = lamp",
  },
  fact: { prompt: "Question: What is the capital of France?\nAnswer:", mark: "" },
};
