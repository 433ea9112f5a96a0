// Go on with a text on Android, with onnxruntime. Takes token ids. UNTESTED: it was never compiled.
//
// build.gradle.kts:  implementation("com.microsoft.onnxruntime:onnxruntime-android:1.23.0")
// Copy mobile/model.ort and config.json of this folder to the app's assets. A smaller library holds
// only what mobile/required_operators_and_types.config names: build onnxruntime with
//   ./build.sh --android ... --minimal_build --include_ops_by_config FILE --enable_reduced_operator_type_support
// For causal models whose cache is float32 (config.json, gptopt_edge.files).
import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtSession
import ai.onnxruntime.TensorInfo
import java.nio.FloatBuffer
import java.nio.LongBuffer
import org.json.JSONObject

/** `model` holds an .ort file, `config` is config.json, `precision` names the file it was made from. */
class Generator(model: ByteArray, config: JSONObject, precision: String, private val end: Set<Long>) : AutoCloseable {
    private val environment = OrtEnvironment.getEnvironment()
    private val session = environment.createSession(model, OrtSession.SessionOptions())
    private val count = config.getJSONObject("gptopt").getInt("tokenizer_size")
    private val longest = config.getJSONObject("gptopt").getInt("block_size")
    private val file = config.getJSONObject("gptopt_edge").getJSONObject("files").getJSONObject(precision)
    private val cacheNames = session.inputNames.filter { it.startsWith("past_key_values") }

    /** The likeliest next tokens, up to and with one that ends the text. */
    fun generate(prompt: LongArray, tokens: Int): List<Long> {
        require(prompt.isNotEmpty() && prompt.size < longest) { "a prompt has 1 to ${longest - 1} tokens" }
        val wanted = minOf(tokens, longest - prompt.size)
        // A static cache is as long as it will ever be, any other one grows from nothing.
        val capacity = if (file.getString("cache") == "static") (prompt.size + wanted).toLong() else 0L
        val empty = cacheNames.associateWith { emptyCache(it, capacity) }
        var past: Map<String, OnnxTensor> = empty
        var result: OrtSession.Result? = null
        val chosen = mutableListOf<Long>()
        var ids = prompt
        var done = 0
        try {
            while (chosen.size < wanted && (chosen.isEmpty() || chosen.last() !in end)) {
                val next = run(ids, done, past)
                result?.close()  // the cache behind it has been read
                result = next
                done += ids.size
                past = cacheNames.associateWith {
                    next.get(it.replace("past_key_values", "present")).get() as OnnxTensor
                }
                chosen.add(likeliest(next.get("logits").get() as OnnxTensor))
                ids = longArrayOf(chosen.last())
            }
        } finally {
            result?.close()
            empty.values.forEach { it.close() }
        }
        return chosen
    }

    private fun run(ids: LongArray, done: Int, past: Map<String, OnnxTensor>): OrtSession.Result {
        val given = mapOf(
            "input_ids" to row(ids),
            "attention_mask" to row(LongArray(done + ids.size) { 1 }),
            "position_ids" to row(LongArray(ids.size) { (done + it).toLong() }),
        )
        try {
            return session.run(given + past)
        } finally {
            given.values.forEach { it.close() }
        }
    }

    private fun row(values: LongArray) =
        OnnxTensor.createTensor(environment, LongBuffer.wrap(values), longArrayOf(1, values.size.toLong()))

    private fun emptyCache(name: String, capacity: Long): OnnxTensor {
        val shape = (session.inputInfo.getValue(name).info as TensorInfo).shape
        val dims = longArrayOf(1, shape[1], capacity, shape[3])
        val zeros = FloatBuffer.allocate((dims[1] * dims[2] * dims[3]).toInt())
        return OnnxTensor.createTensor(environment, zeros, dims)
    }

    /** Of the last position; the head may have more rows than there are ids. */
    private fun likeliest(logits: OnnxTensor): Long {
        val (_, positions, V) = logits.info.shape.map { it.toInt() }
        val scores = logits.floatBuffer
        val start = (positions - 1) * V
        return (0 until count).maxByOrNull { scores.get(start + it) }!!.toLong()
    }

    override fun close() = session.close()
}
