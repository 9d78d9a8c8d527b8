// Which command makes what is missing.
import { code, missing } from "./ui.js";

/** @param {import("./types.js").Task | string} task */
export function noCircuit(task) {
  const [name, why] = typeof task === "string" ? [task, ""] : [task.name, task.circuit_missing];
  return missing(
    `No circuit of this task is in the page${why ? ` (${why})` : ""}; `,
    code(`bridges circuit FOLDER --task ${name}`),
    " searches one.",
  );
}

export function noCircuits() {
  return missing(
    "No circuit is in the page; ",
    code("bridges circuit FOLDER --task all"),
    " searches one for each task.",
  );
}

/** @param {import("./types.js").Task} task */
export function noSteering(task) {
  const why = task.steering_missing;
  return missing(
    `No edit was measured on this task${why ? ` (${why})` : ""}; `,
    code(`bridges steer FOLDER --task ${task.name}`),
    " measures one.",
  );
}

export function noHeadline() {
  return missing("No edit was measured; ", code("bridges steer FOLDER --task NAME"), " measures one.");
}

export function noTasks() {
  return missing("No task is in the page; ", code("bridges steer FOLDER --task NAME"), " measures one.");
}

export function noBridges() {
  return missing("No bridge was measured; ", code("bridges evaluate FOLDER"), " measures them.");
}

/** @param {string} node */
export function noChannel(node) {
  return missing(
    "What this node does on text is not in the page; ",
    code(`bridges circuit FOLDER --feature ${node}`),
    " shows it.",
  );
}

export function noChannels() {
  return missing("No channel is in the page; ", code("bridges circuit FOLDER --feature NODE"), " shows what one does.");
}
