// The command that renders a sample again on one machine, for a POSIX shell with $'...' (bash, zsh, ksh).

// Quote one argument. Control characters, which a terminal could interpret when the command is pasted, get an escape.
function shellQuote(value) {
  if (/^[A-Za-z0-9_.,:=/+-]+$/.test(value)) return value;
  if (!/[\u0000-\u001f\u007f-\u009f\u2028-\u202e\u2066-\u2069\ufeff]/.test(value))
    return `'${value.replaceAll("'", "'\\''")}'`;
  const escaped = value
    .replace(/[\\']/g, "\\$&")
    .replace(/[\u0000-\u001f\u007f-\u009f\u2028-\u202e\u2066-\u2069\ufeff]/g, (char) =>
      char === "\n" ? "\\n" : `\\u${char.charCodeAt(0).toString(16).padStart(4, "0")}`,
    );
  return `$'${escaped}'`;
}

// `params` are those of a record; a whole number above 2^53 is a text of digits.
function renderCommand(params) {
  const numeric = (name) =>
    typeof params[name] === "number" || /^\d{1,19}$/.test(params[name] ?? "") ? String(params[name]) : null;
  const lines = [`hv-batch sample --prompt ${shellQuote(text(params.prompt, 100000))}`];
  const add = (flag, ...names) => {
    const values = names.map(numeric);
    if (values.every((value) => value !== null)) lines.push(`${flag} ${values.join(" ")}`);
  };
  add("--video-size", "height", "width");
  add("--video-length", "num_frames");
  add("--infer-steps", "num_inference_steps");
  add("--seed", "seed");
  add("--embedded-cfg-scale", "guidance_scale");
  add("--flow-shift", "flow_shift");
  if (number(params.cfg_scale) > 1) {
    add("--cfg-scale", "cfg_scale");
    add("--guidance-rescale", "guidance_rescale");
    if (params.negative_prompt) lines.push(`--neg-prompt ${shellQuote(text(params.negative_prompt, 100000))}`);
  }
  return lines.join(" \\\n    ");
}
