/**
 * What the JSON in the page holds; bridges/report writes it.
 *
 * @typedef {object} PageData
 * @property {1} format
 * @property {string} title
 * @property {Record<string, string>} versions
 * @property {string} headline name of the task whose steering result the overview shows, or ""
 * @property {{dense: Model, sparse: Model}} models
 * @property {Bridges} bridges
 * @property {Task[]} tasks
 * @property {Record<string, string>} left_out tasks that the page does not have, and why
 * @property {string} text where the text that channels are shown on comes from, in words
 * @property {Record<string, Circuit>} circuits by task
 * @property {Record<string, Channel>} channels by node, as "1.attn.read.559"
 *
 * @typedef {object} Model
 * @property {string} name
 * @property {number} layers
 * @property {number} width
 * @property {number} parameters
 * @property {number | null} nonzeros
 *
 * @typedef {object} Bridges
 * @property {number} tokens
 * @property {number | null} nmse_tokens
 * @property {number} dense_ce
 * @property {number} sparse_ce
 * @property {number} kl_sparse_alone
 * @property {Site[]} sites
 * @property {Partial<Site>} mean
 *
 * @typedef {object} Site
 * @property {string} name
 * @property {string} dense_site
 * @property {number} d_dense
 * @property {number} d_sparse
 * @property {number} k
 * @property {number} nmse_encode
 * @property {number} nmse_encode_floor
 * @property {number} nmse_decode
 * @property {number} nmse_decode_shuffled
 * @property {number} kl_dense_to_sparse
 * @property {number} kl_dense_to_sparse_mean_ablation
 * @property {number} kl_sparse_to_dense
 * @property {number} kl_sparse_to_dense_mean_ablation
 * @property {number} ce_recovered_dense_to_sparse
 * @property {number} ce_recovered_sparse_to_dense
 * @property {number | null} massive_share
 * @property {number | null} kl_dense_to_sparse_se
 * @property {number | null} kl_sparse_to_dense_se
 *
 * @typedef {object} Task
 * @property {string} name
 * @property {string} description what the task is, in a sentence, or ""
 * @property {number} pairs
 * @property {{dense: number | null, sparse: number | null}} solved share of prompts answered right
 * @property {Example[]} examples
 * @property {{nodes: number, edges: number, loss: number} | null} circuit
 * @property {string} circuit_missing why there is no circuit, "" if there is one
 * @property {{one: Sweep | null, few: Sweep | null}} steering
 * @property {string} steering_missing
 *
 * @typedef {object} Example
 * @property {string[]} prompt tokens
 * @property {string[]} counterfactual
 * @property {number[]} cue where the two differ
 * @property {string[]} answers to the prompt
 * @property {string[]} targets answers to the counterfactual
 *
 * @typedef {"p_target" | "p_target_sparse_model" | "p_target_random_direction" | "p_target_mean_difference_equal_norm"
 *   | "p_target_probe" | "p_target_mean_difference" | "p_target_all_channels"} CurveName
 *
 * @typedef {Partial<Record<CurveName, number[] | null>>} Curves
 *
 * @typedef {object} SweepFigures
 * @property {string} task
 * @property {string} site
 * @property {number | number[]} channel
 * @property {string} at "read" or "residual"
 * @property {number[]} strengths
 * @property {Partial<Record<CurveName, {low: number[], high: number[]}>>} [bands] 95 %
 * @property {number[]} [p_target_by_direction]
 * @property {number} prompts
 * @property {number | null} [accuracy_dense]
 * @property {number | null} [accuracy_sparse]
 * @property {string} [mean_difference_site]
 * @property {{slope: number, r_squared: number, sign: number, r_squared_shuffled: number | null} | null} [agreement]
 * @property {SideEffects | null} [side_effects]
 *
 * @typedef {SweepFigures & Curves} Sweep
 *
 * @typedef {object} SideEffects
 * @property {number} kl
 * @property {number} ce_change
 * @property {number} p_target_off
 * @property {number} kl_added
 * @property {number} kl_before_answer
 * @property {number} tokens
 * @property {number | null} kl_other_tasks
 * @property {[number, number] | null} solved_other_tasks unedited, and with the channels ablated
 *
 * @typedef {object} Circuit
 * @property {string} task
 * @property {{place: string, label: string}[]} columns
 * @property {CNode[]} nodes
 * @property {CEdge[]} edges
 * @property {number} loss
 * @property {number} loss_full_model
 * @property {number} scale
 * @property {number} shift
 * @property {{pairs: number, loss: number, loss_unscaled: number, accuracy: number} | null} fresh on other pairs
 * @property {{loss: number, accuracy: number} | null} ablated the model without the circuit
 * @property {{layer: string, loss: number}[]} ablation_by_layer
 * @property {{layer: number, head: number, prompts: AttentionPrompt[]}[]} attention
 * @property {{name: string, value: string, as_good: boolean | null}[]} controls as_good: held against the circuit; null where no verdict judges it
 * @property {string[]} verdict
 *
 * @typedef {object} AttentionPrompt
 * @property {string} name
 * @property {string[]} tokens
 * @property {number[][]} pattern [query][key]; what a row lacks to 1 goes to an attention sink
 *
 * @typedef {object} CNode
 * @property {string} id
 * @property {number} column
 * @property {number} order 0 to 1, top to bottom
 * @property {number} mean
 * @property {number | null} ablation change of the circuit's loss with this node alone frozen at its mean
 * @property {string} tokens
 *
 * @typedef {object} CEdge
 * @property {number} source index into nodes
 * @property {number} target
 * @property {number} weight
 * @property {"weight" | "stream"} kind
 *
 * @typedef {object} Channel
 * @property {string} node
 * @property {number} tokens
 * @property {number} density
 * @property {number} mean
 * @property {Record<string, number>} percentiles
 * @property {Context[]} positive
 * @property {Context[]} negative
 * @property {Context[]} random
 * @property {[string, number][]} weights_in
 * @property {[string, number][]} weights_out
 * @property {DenseSide | null} dense
 * @property {string} no_dense_side
 * @property {{edges: number[], counts: number[]} | null} histogram
 * @property {Record<string, Context[]>} task_contexts
 * @property {[number, number][] | null} decoder_column
 *
 * @typedef {object} Context
 * @property {number} row
 * @property {number} position
 * @property {number} value
 * @property {string[]} tokens
 * @property {number[]} values
 * @property {number} at
 * @property {number[] | null} readings
 *
 * @typedef {object} DenseSide
 * @property {string} site
 * @property {string} dense_site
 * @property {number} channel
 * @property {number | null} encoder_correlation
 * @property {number} both_active
 * @property {number} either_active
 * @property {number} added
 * @property {number} tokens
 * @property {[string, number][]} raised
 * @property {[string, number][]} lowered
 * @property {number} kl
 * @property {number} kl_random
 * @property {string | null} task
 * @property {number | null} mean_difference
 */
export {};
