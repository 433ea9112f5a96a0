// Go on with a text on iOS or macOS, with onnxruntime. Takes token ids. UNTESTED: never compiled.
//
// Package.swift:  https://github.com/microsoft/onnxruntime-swift-package-manager
// Copy mobile/model.ort and config.json of this folder to the app's bundle. A smaller library holds
// only what mobile/required_operators_and_types.config names: build onnxruntime with
//   --minimal_build --include_ops_by_config FILE --enable_reduced_operator_type_support
// For causal models whose cache is float32 (config.json, gptopt_edge.files).
import Foundation
import OnnxRuntimeBindings

enum GenerateError: Error {
    case badConfig
    case badPrompt(longest: Int)
}

/// `model` is the path of an .ort file, `config` of config.json; `precision` names the file that the
/// .ort file was made from.
final class Generator {
    private let session: ORTSession
    private let count: Int
    private let longest: Int
    private let end: Set<Int64>
    private let isStatic: Bool
    private let heads: Int
    private let width: Int
    private let cacheNames: [String]

    init(model: String, config: URL, precision: String, end: Set<Int64>) throws {
        let read = try JSONSerialization.jsonObject(with: Data(contentsOf: config)) as? [String: Any]
        guard let sizes = read?["gptopt"] as? [String: Any],
              let edge = read?["gptopt_edge"] as? [String: Any],
              let files = edge["files"] as? [String: [String: Any]],
              let file = files[precision],
              let count = sizes["tokenizer_size"] as? Int,
              let longest = sizes["block_size"] as? Int,
              let H = sizes["n_head"] as? Int,
              let C = sizes["n_embd"] as? Int
        else { throw GenerateError.badConfig }
        self.count = count
        self.longest = longest
        self.end = end
        isStatic = file["cache"] as? String == "static"
        heads = sizes["n_kv_head"] as? Int ?? H
        width = sizes["head_dim"] as? Int ?? C / H
        let environment = try ORTEnv(loggingLevel: .error)
        session = try ORTSession(env: environment, modelPath: model, sessionOptions: nil)
        cacheNames = try session.inputNames().filter { $0.hasPrefix("past_key_values") }
    }

    /// The likeliest next tokens, up to and with one that ends the text.
    func generate(_ prompt: [Int64], tokens: Int) throws -> [Int64] {
        guard !prompt.isEmpty, prompt.count < longest else { throw GenerateError.badPrompt(longest: longest) }
        let wanted = min(tokens, longest - prompt.count)
        // A static cache is as long as it will ever be, any other one grows from nothing.
        let capacity = isStatic ? prompt.count + wanted : 0
        var past: [String: ORTValue] = [:]
        for name in cacheNames { past[name] = try zeros([1, heads, capacity, width]) }
        let outputs = ["logits"] + cacheNames.map(present)
        var chosen: [Int64] = []
        var ids = prompt
        var done = 0
        while chosen.count < wanted, chosen.last.map({ !end.contains($0) }) ?? true {
            var given = past
            given["input_ids"] = try row(ids)
            given["attention_mask"] = try row(Array(repeating: 1, count: done + ids.count))
            given["position_ids"] = try row((0..<ids.count).map { Int64(done + $0) })
            let found = try session.run(withInputs: given, outputNames: Set(outputs), runOptions: nil)
            for name in cacheNames { past[name] = found[present(name)] }
            done += ids.count
            chosen.append(try likeliest(found["logits"]!))
            ids = [chosen.last!]
        }
        return chosen
    }

    private func present(_ name: String) -> String {
        name.replacingOccurrences(of: "past_key_values", with: "present")
    }

    private func row(_ values: [Int64]) throws -> ORTValue {
        let data = NSMutableData(bytes: values, length: values.count * MemoryLayout<Int64>.size)
        return try ORTValue(tensorData: data, elementType: .int64, shape: [1, NSNumber(value: values.count)])
    }

    private func zeros(_ shape: [Int]) throws -> ORTValue {
        let data = NSMutableData(length: shape.reduce(MemoryLayout<Float>.size, *))!
        return try ORTValue(tensorData: data, elementType: .float, shape: shape.map { NSNumber(value: $0) })
    }

    /// Of the last position; the head may have more rows than there are ids.
    private func likeliest(_ logits: ORTValue) throws -> Int64 {
        let shape = try logits.tensorTypeAndShapeInfo().shape.map { $0.intValue }
        let start = (shape[1] - 1) * shape[2]
        let data = try logits.tensorData() as Data
        return data.withUnsafeBytes { bytes in
            let scores = bytes.bindMemory(to: Float.self)
            return Int64((0..<count).max { scores[start + $0] < scores[start + $1] }!)
        }
    }
}
