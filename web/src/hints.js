// Which command makes what is missing.
import { code, missing, withCode } from "./ui.js";

/** @param {import("./types.js").Task | string} task */
export function noCircuit(task) {
  const [name, why] = typeof task === "string" ? [task, ""] : [task.name, task.circuit_missing];
  return lacking("circuit of this task", why, `bridges report FOLDER --tasks ${name}`);
}

export function noCircuits() {
  return lacking("circuit", "", "bridges report FOLDER --tasks all");
}

/** @param {import("./types.js").Task} task */
export function noSteering(task) {
  return lacking("edit on this task", task.steering_missing, `bridges report FOLDER --tasks ${task.name}`);
}

export function noHeadline() {
  return lacking("edit", "", "bridges report FOLDER --tasks all");
}

export function noTasks() {
  return lacking("task", "", "bridges report FOLDER --tasks all");
}

export function noBridges() {
  return missing("The page has no figures of bridges.");
}

/** @param {string} node */
export function noChannel(node) {
  return missing("The page has no view of this node; ", code(`bridges circuit MODEL --feature ${node}`), " prints one.");
}

export function noChannels() {
  return lacking("channel", "", "bridges report FOLDER --tasks all");
}

/**
 * The reason that the figures give, or else the command that makes what is missing.
 * @param {string} what @param {string} why @param {string} command
 */
function lacking(what, why, command) {
  return why ? missing(`The page has no ${what}: `, ...withCode(why)) : missing(`The page has no ${what}; `, code(command), " makes it.");
}
